"""Rows to signed bytes (kernels/README.md, step 2), one program for a few segments: rows, or groups of columns of a row.

Steps of a block before the layer (steps.py) are computed here on the way; a segment then stays in registers where it fits.

A segment is read for its range and again for its codes; the second time from the cache, or not at all where the compiler
keeps it in registers. The range is found over integers that are ordered as the numbers are, where a NaN is the largest or
the smallest and so is seen without a question of its own. Codes are rounded after they are clamped, which gives the same
ones, as operands q - z; with 8 bits and a zero point, which would not fit a byte, as q - 128, and 128 - z is written
beside them. The sums of q - z over each group are made on the way.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qvgen_kernels.contract import SCALE_FLOOR, SPAN_FLOOR, LinearSpec, LinearTensors
from qvgen_kernels.triton.launch import INTERPRETED, launch
from qvgen_kernels.triton.layout import layout_of
from qvgen_kernels.triton.quantize_form import (
    WIDEST_TILE,
    Operands,
    QuantizeSizes,
    QuantizeTensors,
    StepsBefore,
    quantize_form,
    warps_of,
    with_steps,
)
from qvgen_kernels.triton.rotate import rotate_rows
from qvgen_kernels.triton.rounding import MAGIC, from_key, order_key, round_to_integer, round_to_type
from qvgen_kernels.triton.steps import prepare

__all__ = ["quantize_kernel", "quantize_rows"]

_SPAN_FLOOR = tl.constexpr(SPAN_FLOOR)
_SCALE_FLOOR = tl.constexpr(SCALE_FLOOR["float32"])

_INFINITY = tl.constexpr(0x7F800000)
_MAGIC_BITS = tl.constexpr(0x4B400000)
"""The bits of MAGIC: those of v + MAGIC are this and the whole number nearest to v."""


@triton.jit
def _load(t, sizes, row, first, columns, mask, form: tl.constexpr):
    """float32 [rows, block] of x after its steps, smoothed; 0 where masked."""
    place = (first[:, None] + columns) * sizes.x_column
    start = row * sizes.x_row
    if form.samples:
        start = (row // sizes.sample_rows) * sizes.x_sample + (row % sizes.sample_rows) * sizes.x_row
    v = tl.load(t.x + start[:, None] + place, mask=mask, other=0.0).to(tl.float32)
    if form.steps:
        v = prepare(v, t, sizes, (row, first[:, None] + columns), row * form.segments < sizes.segments, mask, form)
    if t.input_scale is not None:
        v = v * tl.load(t.input_scale + first[:, None] + columns, mask=mask, other=0.0)
    return v


@triton.jit
def _extremes(t, sizes, row, first, live, form: tl.constexpr):
    """Keys of the smallest and the largest number of every segment, 0 included."""
    columns = tl.arange(0, form.block)[None, :]
    low = tl.full((form.rows, form.block), 0, tl.int32)
    high = low
    for start in range(0, form.segment, form.block):
        mask = live[:, None] & (start + columns < form.segment)
        key = order_key(_load(t, sizes, row, first, start + columns, mask, form))
        low = tl.minimum(low, key)
        high = tl.maximum(high, key)
    return tl.reduce(low, 1, tl.standard._elementwise_min), tl.reduce(high, 1, tl.standard._elementwise_max)


@triton.jit
def _whole_segments(t, sizes, row, first, live, form: tl.constexpr):
    """Segments as they are read once, and the keys of their extremes."""
    columns = tl.arange(0, form.block)[None, :]
    v = _load(t, sizes, row, first, columns, live[:, None] & (columns < form.segment), form)
    key = order_key(v)
    low = tl.reduce(tl.minimum(key, 0), 1, tl.standard._elementwise_min)
    return v, low, tl.reduce(tl.maximum(key, 0), 1, tl.standard._elementwise_max)


@triton.jit
def _at_least(v, floor):
    """The larger one; a NaN stays."""
    return tl.where(v < floor, floor, v)


@triton.jit
def _rounded_scale(scale, form: tl.constexpr):
    """The scale in scale_dtype's precision, float32, within its finite numbers."""
    if form.scale_type == "bfloat16":
        bits = scale.to(tl.int32, bitcast=True)
        scale = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
        scale = tl.minimum(_at_least(scale, form.floor), form.largest)
    elif form.scale_type == "float16":
        scale = round_to_type(scale, tl.float16, False)
        scale = tl.minimum(_at_least(scale, form.floor), form.largest)
    return scale


@triton.jit
def _dynamic(t, row, live, low, high, form: tl.constexpr):
    """Scale before and after it is rounded, and zero point of every segment."""
    qmax = tl.full((form.rows,), form.qmax, tl.float32)
    one = tl.full((form.rows,), 1.0, tl.float32)
    if form.symmetric:
        span = tl.maximum(-low, high)
        if t.clip_high is not None:
            span = span * tl.load(t.clip_high + row, mask=live, other=1.0)
        if form.arithmetic == "division":
            scale = tl.div_rn(_at_least(span, _SPAN_FLOOR), qmax)
            return scale, scale, one * 0.0
        if form.arithmetic == "unrounded":
            scale = _at_least(span * tl.div_rn(one, qmax), _SCALE_FLOOR)
            return scale, _rounded_scale(scale, form), one * 0.0
        exact = _at_least(tl.div_rn(span, qmax), _SCALE_FLOOR)
        scale = _rounded_scale(exact, form)
        # An infinity must not become a number; of the two scales the first one tells.
        scale = tl.where(exact < float("inf"), scale, float("nan"))
        return scale, scale, one * 0.0
    if t.clip_low is not None:
        low = low * tl.load(t.clip_low + row, mask=live, other=1.0)
    if t.clip_high is not None:
        high = high * tl.load(t.clip_high + row, mask=live, other=1.0)
    exact = _at_least(tl.div_rn(high - low, qmax), _SCALE_FLOOR)
    scale = tl.where(exact < float("inf"), _rounded_scale(exact, form), float("nan"))
    zero = tl.minimum(tl.maximum(-low * tl.div_rn(one, scale), 0.0), qmax)
    return scale, scale, round_to_integer(zero)


@triton.jit
def _encode(v, divisor, inverse, zero, form: tl.constexpr):
    """Q - z as int32: clamped and then rounded by the bits of a sum, no conversion needed."""
    scaled = (
        tl.div_rn(v, tl.broadcast_to(divisor[:, None], v.shape))
        if form.arithmetic == "division"
        else v * inverse[:, None]
    )
    low = -zero if not form.symmetric else zero - form.qmax
    scaled = tl.minimum(tl.maximum(scaled, low[:, None]), (form.qmax - zero)[:, None])
    return (scaled + MAGIC).to(tl.int32, bitcast=True) - _MAGIC_BITS


@triton.jit
def _write_codes(t, sizes, v, place, masks, qparams, form: tl.constexpr):
    """Codes of a tile; ``place`` is (rows, columns of the output), ``masks`` (inside of the group, to be written)."""
    divisor, inverse, zero = qparams
    operand = tl.where(masks[0], _encode(v, divisor, inverse, zero, form), 0)
    code = operand
    if form.shifted:
        code = tl.where(masks[0], operand + (zero.to(tl.int32) - 128)[:, None], 0)
    tl.store(t.codes + place[0][:, None] * sizes.codes_row + place[1], code.to(tl.int8), mask=masks[1])
    return operand


@triton.jit
def _write_sum(t, sizes, total, row, group, live):
    if t.row_sum is not None:
        total = tl.reduce(total, 1, tl.standard._sum_combine)
        tl.store(t.row_sum + group * sizes.vector_row + row, total, mask=live)


@triton.jit
def _write(t, sizes, row, part, live, qparams, form: tl.constexpr):
    """Codes and their sums of every group of the segments."""
    columns = tl.arange(0, form.block)[None, :]
    for group in range(form.groups):
        total = tl.full((form.rows, form.block), 0, tl.int32)
        first = part * form.segment + group * form.group
        place = (part * form.groups + group) * form.padded_group
        for start in range(0, form.padded_group, form.block):
            column = start + columns
            inside = live[:, None] & (column < form.group)
            v = _load(t, sizes, row, first, column, inside, form)
            masks = (inside, live[:, None] & (column < form.padded_group))
            total += _write_codes(t, sizes, v, (row, place[:, None] + column), masks, qparams, form)
        _write_sum(t, sizes, total, row, part * form.groups + group, live)


@triton.jit
def quantize_kernel(t, sizes, form: tl.constexpr):
    """Quantize ``form.rows`` segments."""
    index = tl.program_id(0).to(tl.int64) * form.rows + tl.arange(0, form.rows)
    live = index < sizes.segments
    row, part = index // form.segments, index % form.segments
    if form.whole:
        v, low, high = _whole_segments(t, sizes, row, part * form.segment, live, form)
    else:
        low, high = _extremes(t, sizes, row, part * form.segment, live, form)
    if form.static:
        scale = tl.load(t.row_scale + row, mask=live, other=1.0)
        made_with = scale
        zero = scale * 0.0
        if not form.symmetric:
            zero = tl.load(t.row_zero_point + row, mask=live, other=0.0)
        finite = (high <= _INFINITY) & (low >= (-_INFINITY - 1))
    else:
        made_with, scale, zero = _dynamic(t, row, live, from_key(low), from_key(high), form)
        finite = (high < _INFINITY) & (low > (-_INFINITY - 1)) & (made_with < float("inf"))
    tl.store(t.scale + part * sizes.vector_row + row, tl.where(finite, scale, float("nan")), mask=live)
    if t.shift is not None:
        tl.store(t.shift + part * sizes.vector_row + row, 128 - zero.to(tl.int32), mask=live)
    inverse = tl.div_rn(tl.full((form.rows,), 1.0, tl.float32), made_with)
    qparams = (made_with, inverse, zero)
    if form.whole:
        columns = tl.arange(0, form.block)[None, :]
        masks = (live[:, None] & (columns < form.segment), live[:, None] & (columns < form.padded_group))
        total = _write_codes(t, sizes, v, (row, part[:, None] * form.padded_group + columns), masks, qparams, form)
        _write_sum(t, sizes, total, row, part, live)
    else:
        _write(t, sizes, row, part, live, qparams, form)


def quantize_rows(
    x: Tensor, *, spec: LinearSpec, tensors: LinearTensors, before: StepsBefore | None = None
) -> Operands:
    """Smooth, rotate and quantize rows.

    Args:
        x: float32, bfloat16 or float16 [M, K] of any strides, M > 0; where there are steps also [B, n, K].
        spec: The layer; without a rotation where there are steps.
        tensors: input_scale, clips, static scales and zero points.
        before: The steps that x goes through first; None: none.

    Returns:
        Codes, scales, and what the epilogue needs beside them.
    """
    input_scale = _dense(tensors.input_scale)
    if spec.rotation:
        x, input_scale = rotate_rows(x, spec=spec, input_scale=input_scale), None
    rows, layout = x.numel() // spec.in_features, layout_of(spec)
    per_row = spec.in_features // (spec.activation_group_size or spec.in_features)
    form = quantize_form(spec, segments=rows * per_row)
    new = x.new_empty
    padded = -(-rows // WIDEST_TILE) * WIDEST_TILE
    used = layout.groups * layout.padded_group
    codes = new(rows, layout.columns, dtype=torch.int8)
    if used < layout.columns:
        codes[:, used:] = 0
    operands = Operands(
        codes,
        new(per_row, padded, dtype=torch.float32),
        new(per_row, padded, dtype=torch.int32) if form.shifted else None,
        new(layout.groups, padded, dtype=torch.int32) if spec.weight_zero_point != "none" else None,
    )
    vectors = (tensors.clip_low, tensors.clip_high, tensors.row_scale, tensors.row_zero_point)
    given = QuantizeTensors(x, *operands, input_scale, *(_dense(vector) for vector in vectors))
    sizes = QuantizeSizes(rows * per_row, *x.stride()[-2:], layout.columns, padded)
    if before is not None:
        form, given, sizes = with_steps(form, given, sizes, before, interpreted=INTERPRETED)
    grid = (triton.cdiv(rows * per_row, form.rows),)
    launch(quantize_kernel, grid, given, sizes, form, on=x, num_warps=warps_of(form))
    return operands


def _dense(vector: Tensor | None) -> Tensor | None:
    return None if vector is None else vector.contiguous()
