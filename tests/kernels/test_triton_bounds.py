"""The bounds that interpreted Triton kernels are held to see what goes beyond a tensor, and nothing else."""

import pytest
import torch

from tests.kernels.triton_bounds import checked_bounds, interpreter

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
    with checked_bounds():
        if message is None:
            interpreter.InterpretedFunction(copy_)[(1,)](x, y, count, stride)
            assert torch.equal(y[:count], x[: (count - 1) * stride + 1 : stride])
        else:
            with pytest.raises(Exception, match=f"a kernel {message}"):
                interpreter.InterpretedFunction(copy_)[(1,)](x, y, count, stride)
