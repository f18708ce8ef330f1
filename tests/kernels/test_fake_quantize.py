"""The operators of fused fake quantization by themselves: schemas, shapes without values, sums, errors, reasons against them.

Their bits in a layer, over all grids, are held in tests/layers/test_fused_product.py.
"""

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from qvgen_kernels import fake_quantize_cpu
from qvgen_kernels.cpu_library import missing_reason
from qvgen_kernels.fake_quantize import RowSpec, operators, refusal

pytestmark = pytest.mark.skipif(missing_reason() is not None, reason="no C++ compiler")
ops = torch.ops.qvgen
DYNAMIC = RowSpec(kind="dynamic", qmin=0, qmax=7, zero_point="integer", group=40, floor=1e-8, ceiling=3e38)
LEARNED = RowSpec(
    kind="learned", qmin=0, qmax=7, zero_point="real", group=20, factor=0.5, factored=False, row_sums=True
)


def calls():
    """Operator and arguments of every kind of call."""
    draw = torch.Generator().manual_seed(0)
    x, grad, y = (torch.randn(5, 40, generator=draw) for _ in range(3))
    clips, params = [torch.full((5, 1), 0.9)] * 2, [torch.full((5, 2), 0.3), torch.full((5, 2), 2.5)]
    extremes = [x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)]
    column = torch.rand(40, generator=draw)
    text, learned = DYNAMIC.to_string(), LEARNED.to_string()
    return [
        (ops.quantize_rows, (x, clips, None, text, torch.bfloat16)),
        (ops.quantize_rows, (x, params, grad, learned, torch.float32)),
        (ops.row_scales, (extremes, clips, text)),
        (ops.quantize_rows_backward, (grad, x, clips, extremes, text, torch.float32)),
        (ops.quantize_rows_backward, (grad, x, params, [], learned, None)),
        (ops.scale_output, (y, clips[0], column, clips[1], column, x, column)),
        (ops.scale_gradient, (grad, clips[0], column, torch.float32)),
    ]


@pytest.mark.parametrize("index", range(7))
def test_schemas_and_shapes_are_the_truth(index):
    operator, arguments = calls()[index]
    torch.library.opcheck(operator.default, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("device", ["meta", "cuda"])
def test_no_value_is_needed_on_any_device(device):
    """Fake tensors of a device without an implementation know their shapes too."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(5, 40, device=device)
        clips = [torch.empty(5, 1, device=device)] * 2
        operand, scale, zero, low, high, row_sum = ops.quantize_rows(
            x, clips, None, DYNAMIC.to_string(), torch.bfloat16
        )
    assert (operand.dtype, operand.shape, operand.device.type) == (torch.bfloat16, (5, 40), device)
    assert [value.shape for value in (scale, zero, low, high, row_sum)] == [(5, 1), (0,), (5, 1), (5, 1), (0,)]


@pytest.mark.parametrize("columns", [8, 9, 16, 31, 32, 63, 64, 100, 511, 512, 513, 1100, 4096, 8960, 20000])
def test_sums_of_rows_are_torchs(columns):
    """Every rest of registers and runs, and three levels."""
    draw = torch.Generator().manual_seed(columns)
    x, grad = (torch.randn(4, columns, generator=draw) for _ in range(2))
    spec = RowSpec(kind="static", qmin=0, qmax=3, zero_point="integer", group=columns)
    zeros, ones = torch.zeros(4, 1), torch.ones(4, 1)
    codes, kept = x.round().clamp(0, 3), torch.where((x.round() >= 0) & (x.round() <= 3), grad, 0.0)
    expected = (grad * codes).sum(-1) - (kept * x).sum(-1), (kept - grad).sum(-1)
    dx = grad.clone()
    operand, first, second = ops.quantize_rows_backward(dx, x, [ones, zeros], [], spec.to_string(), torch.float32)
    assert torch.equal(operand, codes)
    assert torch.equal(dx, kept)
    assert torch.equal(first[:, 0], expected[0])
    assert torch.equal(second[:, 0], expected[1])


def test_this_torch_adds_as_the_library_does():
    assert fake_quantize_cpu._refusal() is None


@pytest.mark.parametrize(
    ("x", "spec", "reason"),
    [
        (torch.zeros(2, 40, device="meta"), DYNAMIC, "no fused operators for meta"),
        (torch.zeros(2, 40, dtype=torch.float64), DYNAMIC, "float64"),
        (torch.zeros(0, 40), DYNAMIC, re.escape("[0, 40]")),
        (torch.zeros(40, 2).t(), DYNAMIC, "side by side"),
        (torch.zeros(2, 28), RowSpec(kind="dynamic", qmin=0, qmax=7, zero_point="integer", group=7), "groups of 7"),
        (
            torch.zeros(1, 40).expand(1 << 20, 40),
            RowSpec(kind="learned", qmin=0, qmax=1 << 20, zero_point="real", group=40),
            "order",
        ),
        (torch.zeros(2, 40), replace(DYNAMIC, zero_point="real"), "need not contain 0"),
    ],
)
def test_a_reason_is_given(x, spec, reason):
    assert re.search(reason, refusal(x, spec))


def test_a_single_long_row_is_torchs_on_several_threads():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert "threads" in refusal(torch.zeros(1, 40), DYNAMIC)
        torch.set_num_threads(1)
        assert refusal(torch.zeros(1, 40), DYNAMIC) is None
    finally:
        torch.set_num_threads(before)


def test_a_gradient_that_can_not_be_written_over_is_refused():
    clips, text = [torch.ones(2, 1)] * 2, DYNAMIC.to_string()
    x = torch.zeros(2, 40)
    for grad in (torch.zeros(40, 2).t(), torch.zeros(2, 40).double(), torch.zeros(1, 40)):
        with pytest.raises(ValueError, match=r"grad is .* it must be contiguous float32 \[2, 40\]"):
            ops.quantize_rows_backward(grad, x, clips, [x[:, :1], x[:, :1]], text, None)
    with pytest.raises(ValueError, match="it must be contiguous"):
        ops.scale_output(torch.zeros(40, 2).t(), None, None, None, None, None, None)


def test_specs_survive_their_text():
    assert RowSpec.from_string(LEARNED.to_string()) == LEARNED


class Listening(TorchDispatchMode):
    """Sees the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


class Marked(torch.Tensor):
    """A tensor of a class of its own, which torch's dispatcher may have rules for."""


def test_operators_pass_the_dispatcher_only_where_somebody_listens_and_give_the_same_bits() -> None:
    x, clips = torch.randn(5, 64), [torch.full((5, 1), 0.9), torch.full((5, 1), 0.8)]
    spec = RowSpec(kind="dynamic", qmin=0, qmax=7, zero_point="integer", group=64, row_sums=True).to_string()
    direct = operators(x).quantize_rows(x, clips, None, spec, torch.float32)
    assert operators(x) is not torch.ops.qvgen
    with Listening() as mode:
        listened = operators(x).quantize_rows(x, clips, None, spec, torch.float32)
    assert "qvgen.quantize_rows.default" in mode.seen
    assert all(torch.equal(a, b) for a, b in zip(direct, listened, strict=True))
    assert operators(x.as_subclass(Marked)) is torch.ops.qvgen
