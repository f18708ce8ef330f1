"""Scales around the product of fake quantization on GPUs, element by element; see qvgen_kernels.fake_quantize."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from qvgen_kernels.triton.launch import INTERPRETED
from qvgen_kernels.triton.rounding import to_type

__all__ = ["BLOCK", "GradientTensors", "OutputTensors", "scale_gradient_kernel", "scale_output_kernel"]

BLOCK = 1024
"""Columns of a program, of one row."""

_INTERPRETED = tl.constexpr(INTERPRETED)
_BLOCK = tl.constexpr(BLOCK)


class OutputTensors(NamedTuple):
    """Pointers of scale_output; what is not there is None. All lie densely."""

    y: Any
    row_scale: Any
    column_scale: Any
    row_sum: Any
    column_zero: Any
    branch: Any
    bias: Any


class GradientTensors(NamedTuple):
    """Pointers of scale_gradient."""

    grad: Any
    row_scale: Any
    column_scale: Any
    by_row: Any
    by_column: Any


@triton.jit
def scale_output_kernel(t, width):
    """Zero points, scales, branch and bias onto a piece of a row of y, in place."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * _BLOCK + tl.arange(0, _BLOCK)
    mask = column < width
    place = t.y + row * width + column
    y = tl.load(place, mask=mask, other=0.0).to(tl.float32)
    if t.column_zero is not None:
        y = y - tl.load(t.row_sum + row) * tl.load(t.column_zero + column, mask=mask, other=0.0)
    if t.row_scale is not None:
        y = (y * tl.load(t.row_scale + row)) * tl.load(t.column_scale + column, mask=mask, other=0.0)
    if t.branch is not None:
        y = y + tl.load(t.branch + row * width + column, mask=mask, other=0.0).to(tl.float32)
    if t.bias is not None:
        y = y + tl.load(t.bias + column, mask=mask, other=0.0)
    tl.store(place, to_type(y, t.y.dtype.element_ty, _INTERPRETED), mask=mask)


@triton.jit
def scale_gradient_kernel(t, width):
    """A piece of a row of a product's gradient, times the scales of its columns, and times that of its row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * _BLOCK + tl.arange(0, _BLOCK)
    mask = column < width
    grad = tl.load(t.grad + row * width + column, mask=mask, other=0.0)
    by_row = grad * tl.load(t.column_scale + column, mask=mask, other=0.0)
    by_column = grad * tl.load(t.row_scale + row)
    tl.store(t.by_row + row * width + column, to_type(by_row, t.by_row.dtype.element_ty, _INTERPRETED), mask=mask)
    tl.store(
        t.by_column + row * width + column, to_type(by_column, t.by_column.dtype.element_ty, _INTERPRETED), mask=mask
    )
