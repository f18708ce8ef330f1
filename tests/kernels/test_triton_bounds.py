"""The checks of interpreted Triton kernels see what goes beyond a tensor and which programs race, and nothing else."""

import pytest
import torch

from tests.kernels.triton_bounds import checked_accesses, interpreter

tl = pytest.importorskip("triton.language", reason="Triton is not installed here")


def copy_(x, y, count, stride):
    place = tl.arange(0, 16)
    tl.store(y + place, tl.load(x + place * stride, mask=place < count, other=0.0), mask=place < count)


@pytest.mark.parametrize(
    ("read", "written", "count", "stride", "message"),
    [
        (16, 16, 16, 1, None),
        (9, 9, 9, 1, None),  # what a mask turns off may lie anywhere
        (17, 9, 9, 2, None),
        (9, 9, 10, 1, "reads 4 bytes at byte 36 "),
        (16, 9, 9, 2, "reads 4 bytes at byte 64 "),
        (16, 9, 10, 1, "writes 4 bytes at byte 36 "),
    ],
)
def test_accesses_beyond_a_tensor_are_errors(read, written, count, stride, message):
    memory = torch.arange(64.0)
    x, y = memory[:read], torch.zeros(64)[:written]
    with checked_accesses():
        if message is None:
            interpreter.InterpretedFunction(copy_)[(1,)](x, y, count, stride)
            assert torch.equal(y[:count], x[: (count - 1) * stride + 1 : stride])
        else:
            with pytest.raises(Exception, match=f"a kernel {message}"):
                interpreter.InterpretedFunction(copy_)[(1,)](x, y, count, stride)


def add_one_(x, y, step, shift):
    """Each program makes four elements of y, from the one on that its number gives, of those of x a shift away."""
    place = 1 + tl.program_id(0) * step + tl.arange(0, 4)
    tl.store(y + place, tl.load(x + place + shift) + 1.0)


@pytest.mark.parametrize(
    ("step", "shift", "in_place", "message"),
    [
        (4, 0, False, None),
        (4, 0, True, None),  # each program writes what it alone has read
        (0, 0, False, "program 1 writes byte 4,"),  # both store the same values
        (3, 0, False, "program 1 writes byte 16,"),
        (4, 4, True, "program 1 writes byte 20,"),  # which the first one has read
        (4, -1, True, "program 1 reads byte 16,"),  # which the first one has written
    ],
)
def test_programs_that_touch_what_another_one_writes_are_errors(step, shift, in_place, message):
    x = torch.arange(24.0)
    y = x if in_place else torch.zeros(24)
    with checked_accesses():
        if message is None:
            interpreter.InterpretedFunction(add_one_)[(2,)](x, y, step, shift)
            assert torch.equal(y[1:9], torch.arange(2.0, 10.0))
        else:
            with pytest.raises(Exception, match=message):
                interpreter.InterpretedFunction(add_one_)[(2,)](x, y, step, shift)
