"""The Triton half of fused fake quantization, interpreted on the CPU, against the C++ half: all results, bit for bit.

The C++ half is held to torch and to qvgen.quant.ste in test_fake_quantize.py and tests/layers/test_fused_product.py. The
machine code is looked at in test_triton_code.py. Nothing here ran on a GPU.
"""

import random
from dataclasses import replace

import pytest
import torch

from qvgen_kernels.cpu_library import missing_reason
from qvgen_kernels.fake_quantize import SCHEMAS, RowSpec, fits_int8, refusal
from tests.kernels.triton_interpreter import _quiet_numpy, fake_operators

__all__ = ["_quiet_numpy"]
pytestmark = pytest.mark.skipif(missing_reason() is not None, reason="no C++ compiler")
ops = torch.ops.qvgen
FLOATS = [torch.float32, torch.bfloat16, torch.float16]


def draw_spec(draw):
    kind = draw.choice(["dynamic", "static", "learned"])
    zero_point = draw.choice(["integer", "none", "real"] if kind == "learned" else ["integer", "none"])
    bits, is_free = draw.choice([2, 3, 4, 8]), zero_point == "none" and kind == "dynamic"
    return RowSpec(
        kind=kind,
        qmin=1 - 2 ** (bits - 1) if zero_point == "none" else 0,
        qmax=2 ** (bits - 1) - 1 if zero_point == "none" else 2**bits - 1,
        zero_point=zero_point,
        group=draw.choice([8, 9, 16, 31, 32, 40, 64, 100, 513]),
        arithmetic=draw.choice(["reciprocal", "division", "unrounded"]) if is_free else "reciprocal",
        scale_dtype="float32" if kind == "static" else draw.choice(["float32", "bfloat16", "float16"]),
        floor=1e-8,
        ceiling=draw.choice([3e38, 65504.0]),
        factor=draw.choice([1.0, 0.37]),
        factored=draw.random() < 0.6,
        raw=zero_point == "real" and draw.random() < 0.5,
        row_sums=zero_point != "real" and draw.random() < 0.5,
    )


def draw_rows(draw, columns):
    """Rows that are zero, one-sided, not finite, tiny, huge, on the grid, with equal extremes; maybe of a wider tensor."""
    x = torch.randn(draw.choice([1, 5, 37]), columns + draw.choice([0, 3])) * 10 ** draw.uniform(-2, 2)
    if len(x) > 1:
        x[0], x[1], x[2, 1], x[3, 2], x[4] = 0, x[1].abs(), float("nan"), float("inf"), -x[4].abs()
        x[4, :3] = x[4].min()
    if len(x) > 5:
        x[5], x[6], x[7], x[8, ::2] = x[5] * 1e-25, x[6] * 1e33, x[7].round(), -0.0
    return x.to(draw.choice(FLOATS))[:, :columns]


def draw_params(draw, spec, rows, groups):
    if spec.kind == "dynamic":
        return [torch.rand(rows, 1) * 0.5 + 0.5, torch.rand(rows, 1) * 0.5 + 0.5]
    if spec.kind == "static":
        return [torch.rand(rows, 1) + 0.1, torch.randint(0, max(spec.qmax, 1) + 1, (rows, 1)).float()]
    params = [torch.rand(rows, groups) * 0.5 - 0.01, torch.rand(rows, groups) * spec.qmax * 1.2 - 0.2]
    params[1][-1] = -1e6 if rows > 1 else -7.3  # of rows that do not contain 0, and beyond what is usable
    return params[: 1 if spec.zero_point == "none" else 2]


def assert_same(found, expected, names):
    for name, one, other in zip(names, found, expected, strict=True):
        assert one.dtype == other.dtype, name
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("seed", range(18))
def test_rows_and_gradients_are_those_of_the_cpu(seed):
    draw = random.Random(seed)
    torch.manual_seed(seed)
    spec = replace(draw_spec(draw), through_zero_point=seed % 2 == 0)
    groups = 1 if spec.kind == "static" else draw.choice([1, 1, 2, 3])
    x = draw_rows(draw, spec.group * groups)
    params, dtype = draw_params(draw, spec, len(x), groups), draw.choice(FLOATS)
    helper = torch.randn(x.shape) if spec.kind == "learned" and draw.random() < 0.5 else None
    text = spec.to_string()

    expected = ops.quantize_rows(x, params, helper, text, dtype)
    found = fake_operators.quantize_rows(x, params, helper, text, dtype)
    assert_same(found, expected, names := ("operand", "scale", "zero", "low", "high", "row_sum"))
    if fits_int8(spec):
        whole = [made.quantize_rows(x, params, None, text, torch.int8) for made in (fake_operators, ops)]
        assert_same(*whole, names)
    extremes = expected[3:5] if spec.kind == "dynamic" else []
    if extremes:
        scales = ops.row_scales(extremes, params, text)
        assert_same([fake_operators.row_scales(extremes, params, text)], [scales], ["row_scales"])

    grad = torch.randn(x.shape)
    dx, wanted, dtype = grad.clone(), grad.clone(), draw.choice([None, dtype])
    expected = ops.quantize_rows_backward(wanted, x, params, extremes, text, dtype)
    found = fake_operators.quantize_rows_backward(dx, x, params, extremes, text, dtype)
    assert_same((dx, *found), (wanted, *expected), ("dx", "operand", "grad_first", "grad_second"))
    assert not torch.equal(dx, grad)


def test_sums_of_long_rows_have_all_levels():
    """Sums are moved up after every 16 runs of 32 columns, and again after 256 runs."""
    columns = 8760
    torch.manual_seed(0)
    spec = RowSpec(kind="static", qmin=0, qmax=3, zero_point="integer", group=columns)
    x, grad, params = torch.randn(1, columns), torch.randn(1, columns), [torch.full((1, 1), 0.3), torch.ones(1, 1)]
    wanted, dx = grad.clone(), grad.clone()
    expected = ops.quantize_rows_backward(wanted, x, params, [], spec.to_string(), None)
    found = fake_operators.quantize_rows_backward(dx, x, params, [], spec.to_string(), None)
    assert_same((dx, *found), (wanted, *expected), ("dx", "operand", "grad_first", "grad_second"))
    plain = (grad * ((x / 0.3).round() + 1).clamp(0, 3).sub(1)).flip(-1).sum(-1)
    assert not torch.equal(found[1][:, 0], plain)  # another order is another sum


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("width", [7, 1025])
def test_scales_around_the_product_are_those_of_the_cpu(dtype, width):
    torch.manual_seed(width)
    y, branch = torch.randn(3, width).to(dtype), torch.randn(3, width).to(dtype)
    row, column, bias = torch.rand(3, 1), torch.rand(width, 1), torch.randn(width)
    sums = torch.randint(-50, 50, (3,)).float()
    for arguments in [
        (row, column, None, None, None, None),
        (row, column, sums, bias, branch, bias),
        (None, None, None, None, branch, None),
        (None, None, None, None, None, bias),
    ]:
        found, expected = y.clone(), y.clone()
        fake_operators.scale_output(found, *arguments)
        ops.scale_output(expected, *arguments)
        assert torch.equal(found, expected)
    grad = torch.randn(3, width)
    expected = ops.scale_gradient(grad, row, column, dtype)
    assert_same(fake_operators.scale_gradient(grad, row, column, dtype), expected, ("by_row", "by_column"))


def test_what_can_not_be_written_over_is_refused():
    x, params = torch.zeros(2, 40), [torch.ones(2, 1)] * 2
    text = RowSpec(kind="static", qmin=0, qmax=3, zero_point="integer", group=40).to_string()
    with pytest.raises(ValueError, match=r"grad is .* it must be contiguous float32 \[2, 40\]"):
        fake_operators.quantize_rows_backward(torch.zeros(40, 2).t(), x, params, [], text, None)
    with pytest.raises(ValueError, match="it must be contiguous"):
        fake_operators.scale_output(torch.zeros(40, 2).t(), None, None, None, None, None, None)


def test_cuda_tensors_get_it_where_triton_runs():
    names = [schema.split("(")[0] for schema in SCHEMAS]
    assert all(torch._C._dispatch_has_kernel_for_dispatch_key(f"qvgen::{name}", "CUDA") for name in names)
    if not torch.cuda.is_available():
        with torch._subclasses.FakeTensorMode():
            x = torch.empty(2, 40, device="cuda")
        assert "torch finds no GPU" in refusal(
            x, RowSpec(kind="static", qmin=0, qmax=3, zero_point="integer", group=40)
        )
