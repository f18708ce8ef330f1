"""The operators of qvgen_kernels.fake_quantize in Triton: one or two launches each, nothing waits for the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from qvgen_kernels.fake_quantize import RowSpec, check_gradient, check_output, gradient_outputs, quantized_outputs
from qvgen_kernels.triton.fake_form import FakeForm, FakeSizes, FakeTensors, fake_form
from qvgen_kernels.triton.fake_gradient import fake_gradient_kernel
from qvgen_kernels.triton.fake_output import (
    BLOCK,
    GradientTensors,
    OutputTensors,
    scale_gradient_kernel,
    scale_output_kernel,
)
from qvgen_kernels.triton.fake_quantize import fake_quantize_kernel, scales_kernel
from qvgen_kernels.triton.launch import launch

__all__ = ["quantize_rows", "quantize_rows_backward", "row_scales", "scale_gradient", "scale_output"]

WARPS = 4


def _dense(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.float().contiguous()


def _pair(params: Sequence[Tensor]) -> tuple[Tensor | None, Tensor | None]:
    """First and second parameter; symmetric weights have no second."""
    return _dense(params[0]), _dense(params[1]) if len(params) == 2 else None


def _form(spec: RowSpec, rows: int, columns: int) -> tuple[FakeForm, int, tuple[int]]:
    """Constants, groups of all rows, and the grid of programs."""
    groups = columns // spec.group
    segments = rows * groups
    form = fake_form(spec, groups=groups, segments=segments)
    return form, segments, (triton.cdiv(segments, form.rows),)


def quantize_rows(
    x: Tensor, params: Sequence[Tensor], helper: Tensor | None, spec: str, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """See ``qvgen::quantize_rows``; x [M, K], whose columns lie side by side."""
    parsed = RowSpec.from_string(spec)
    made = quantized_outputs(x, parsed, dtype)
    operand, scale, zero, low, high, row_sum = made
    form, segments, grid = _form(parsed, *x.shape)
    sums = torch.empty_like(scale) if parsed.row_sums else None
    is_dynamic = parsed.kind == "dynamic"
    tensors = FakeTensors(
        x,
        *_pair(params),
        low if is_dynamic else None,
        high if is_dynamic else None,
        scale,
        zero if parsed.zero_point == "real" else None,
        sums,
        operand,
        _dense(helper),
    )
    launch(fake_quantize_kernel, grid, tensors, FakeSizes(segments, x.stride(0)), form, on=x, num_warps=WARPS)
    if sums is not None:
        torch.sum(sums, 1, out=row_sum)  # whole numbers: exact in any order
    return made


def row_scales(extremes: Sequence[Tensor], params: Sequence[Tensor], spec: str) -> Tensor:
    """See ``qvgen::row_scales``."""
    parsed = RowSpec.from_string(spec)
    low, high = (value.float().contiguous() for value in extremes)
    rows = params[0].numel()
    scale = torch.empty_like(low)
    form, segments, grid = _form(parsed, rows, low.numel() // max(1, rows) * parsed.group)
    tensors = FakeTensors(None, *_pair(params), low, high, scale)
    launch(scales_kernel, grid, tensors, FakeSizes(segments, 0), form, on=scale, num_warps=WARPS)
    return scale


def quantize_rows_backward(
    grad: Tensor,
    x: Tensor,
    params: Sequence[Tensor],
    extremes: Sequence[Tensor],
    spec: str,
    dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``qvgen::quantize_rows_backward``; dx takes the place of the gradient."""
    check_gradient(grad, x)
    parsed = RowSpec.from_string(spec)
    operand, grad_first, grad_second = gradient_outputs(x, parsed, dtype)
    form, segments, grid = _form(parsed, *x.shape)
    low, high = (_dense(value) for value in extremes) if extremes else (None, None)
    tensors = FakeTensors(
        x,
        *_pair(params),
        low,
        high,
        operand=None if dtype is None else operand,
        grad=grad,
        grad_first=grad_first,
        grad_second=grad_second,
    )
    launch(fake_gradient_kernel, grid, tensors, FakeSizes(segments, x.stride(0)), form, on=x, num_warps=WARPS)
    return operand, grad_first, grad_second


def scale_output(
    y: Tensor,
    row_scale: Tensor | None,
    column_scale: Tensor | None,
    row_sum: Tensor | None,
    column_zero: Tensor | None,
    branch: Tensor | None,
    bias: Tensor | None,
) -> None:
    """See ``qvgen::scale_output``."""
    check_output(y)
    vectors = (_dense(value) for value in (row_scale, column_scale, row_sum, column_zero))
    dense_branch = None if branch is None else branch.to(y.dtype).contiguous()
    rows, width = y.shape
    if y.numel():
        tensors = OutputTensors(y, *vectors, dense_branch, _dense(bias))
        launch(scale_output_kernel, (rows, triton.cdiv(width, BLOCK)), tensors, width, on=y, num_warps=WARPS)


def scale_gradient(grad: Tensor, row_scale: Tensor, column_scale: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """See ``qvgen::scale_gradient``."""
    grad = grad.contiguous()
    by_row, by_column = torch.empty_like(grad, dtype=dtype), torch.empty_like(grad, dtype=dtype)
    rows, width = grad.shape
    if grad.numel():
        tensors = GradientTensors(grad, _dense(row_scale), _dense(column_scale), by_row, by_column)
        launch(scale_gradient_kernel, (rows, triton.cdiv(width, BLOCK)), tensors, width, on=grad, num_warps=WARPS)
    return by_row, by_column
