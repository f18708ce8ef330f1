"""Rows of fake quantization on GPUs: the grid of a group, and rows to the operand of a product in one pass after extremes.

Operation by operation what csrc/cpu/fake_quantize.inl computes, so that both give the same bits (kernels/README.md). A
program takes a few groups of columns; it reads them for their extremes, and again for their codes, from the cache.
"""

from __future__ import annotations

import triton
import triton.language as tl

from qvgen_kernels.contract import SCALE_FLOOR, SPAN_FLOOR
from qvgen_kernels.triton.launch import INTERPRETED
from qvgen_kernels.triton.rounding import round_to_integer, round_to_type, to_type

__all__ = ["at_least", "at_most", "centered_codes", "choose_grid", "fake_quantize_kernel", "scales_kernel"]

_SPAN_FLOOR = tl.constexpr(SPAN_FLOOR)
_SCALE_FLOOR = tl.constexpr(SCALE_FLOOR["float32"])
_LARGEST_ZERO = tl.constexpr(131072.0)
_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def at_least(v, floor):
    """The larger one; a NaN stays."""
    return tl.where(v < floor, floor, v)


@triton.jit
def at_most(v, ceiling):
    """The smaller one; a NaN stays."""
    return tl.where(v > ceiling, ceiling, v)


@triton.jit
def _rounded_scale(scale, form: tl.constexpr):
    """To the grid's precision: a NaN stays, an infinity becomes the largest number of a 16-bit type."""
    if form.scale_type == "bfloat16":
        scale = at_most(at_least(round_to_type(scale, tl.bfloat16, _INTERPRETED), form.smallest), form.largest)
    elif form.scale_type == "float16":
        scale = at_most(at_least(round_to_type(scale, tl.float16, _INTERPRETED), form.smallest), form.largest)
    return scale


@triton.jit
def _of_range(low, high, clip_low, clip_high, form: tl.constexpr):
    """Scale, what rows are divided by, 1 over that, and zero point, of extremes times clips."""
    qmax = tl.full((form.rows,), form.qmax, tl.float32)
    one = tl.full((form.rows,), 1.0, tl.float32)
    top = high * clip_high if form.zero_point == "none" else at_least(high, 0.0) * clip_high
    bottom = at_most(low, 0.0) * clip_low
    span = top if form.zero_point == "none" else top - bottom
    if form.arithmetic == "division":
        divisor = tl.div_rn(at_least(span, _SPAN_FLOOR), qmax)
        scale = divisor
    elif form.arithmetic == "unrounded":
        divisor = at_least(span * tl.div_rn(one, qmax), _SCALE_FLOOR)
        scale = _rounded_scale(divisor, form)
    else:
        divisor = _rounded_scale(at_least(tl.div_rn(span, qmax), _SCALE_FLOOR), form)
        scale = divisor
    inverse = tl.div_rn(one, divisor)
    zero = one * 0.0
    if form.zero_point != "none":
        zero = -bottom * inverse
        if form.zero_point == "integer":
            zero = round_to_integer(zero)
        zero = at_most(at_least(zero, 0.0), qmax)
    return scale, divisor, inverse, zero


@triton.jit
def choose_grid(t, index, row, live, low, high, form: tl.constexpr):
    """Scale, divisor, inverse and zero point of every group, and the two parameters that it was given."""
    place = index if form.kind == "learned" else row
    first = tl.load(t.first + place, mask=live, other=1.0)
    second = first * 0.0
    if t.second is not None:
        second = tl.load(t.second + place, mask=live, other=1.0)
    if form.kind == "dynamic":
        scale, divisor, inverse, zero = _of_range(low, high, first, second, form)
        return scale, divisor, inverse, zero, first, second
    scale = first
    zero = second
    if form.kind == "learned":
        scale = _rounded_scale(at_least(scale, _SCALE_FLOOR), form)
        if form.zero_point == "integer":
            zero = at_most(at_least(round_to_integer(zero), 0.0), tl.full((form.rows,), form.qmax, tl.float32))
        else:
            zero = at_most(at_least(zero, -_LARGEST_ZERO), _LARGEST_ZERO)
    if form.zero_point == "none":
        zero = zero * 0.0
    inverse = tl.div_rn(tl.full((form.rows,), 1.0, tl.float32), scale)
    return scale, scale, inverse, zero, first, second


@triton.jit
def unclamped_codes(v, divisor, inverse, zero, form: tl.constexpr):
    """Codes of [rows, columns] before the clamp."""
    if form.zero_point == "real":
        return round_to_integer(v * inverse[:, None] + zero[:, None]) + 0.0
    if form.arithmetic == "division":
        return round_to_integer(tl.div_rn(v, tl.broadcast_to(divisor[:, None], v.shape))) + zero[:, None]
    return round_to_integer(v * inverse[:, None]) + zero[:, None]


@triton.jit
def centered_codes(u, zero, form: tl.constexpr):
    """Clamped codes minus the zero point."""
    return at_most(at_least(u, form.qmin), form.qmax) - zero[:, None]


@triton.jit
def operand_of(centered, scale, zero, helper, form: tl.constexpr):
    """The operand of clamped codes minus the zero point; ``helper`` is a tile of it, or None."""
    if not form.factored:
        centered = centered * scale[:, None]
    elif form.zero_point == "real" and form.raw:
        centered = round_to_integer(centered + zero[:, None])
    if helper is not None:
        if form.factored:
            helper = tl.div_rn(helper, tl.broadcast_to(scale[:, None], helper.shape))
        centered = centered + helper
    return centered


@triton.jit
def load_rows(t, sizes, row, first, columns, mask):
    """float32 [rows, block] of x."""
    return tl.load(t.x + row[:, None] * sizes.x_row + first[:, None] + columns, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _extremes(t, sizes, row, first, live, form: tl.constexpr):
    """Minimum and maximum of every group, or (symmetric) -max|x| and max|x|; NaN where there is one."""
    columns = tl.arange(0, form.block)[None, :]
    low = tl.full((form.rows, form.block), float("inf"), tl.float32)
    high = -low
    missing = tl.full((form.rows, form.block), 0, tl.int32)
    for start in range(0, form.columns, form.block):
        mask = live[:, None] & (start + columns < form.columns)
        v = load_rows(t, sizes, row, first, start + columns, mask)
        missing += (v != v).to(tl.int32)
        if form.zero_point == "none":
            v = tl.abs(v)
        low = tl.where(mask & (v < low), v, low)
        high = tl.where(mask & (v > high), v, high)
    has_nan = tl.reduce(missing, 1, tl.standard._sum_combine) > 0
    least = tl.where(has_nan, float("nan"), tl.reduce(low, 1, tl.standard._elementwise_min))
    most = tl.where(has_nan, float("nan"), tl.reduce(high, 1, tl.standard._elementwise_max))
    return -most if form.zero_point == "none" else least, most


@triton.jit
def fake_quantize_kernel(t, sizes, form: tl.constexpr):
    """Quantize ``form.rows`` groups: operand, scale, zero point, extremes, and sums of q - z (added up over groups)."""
    index = tl.program_id(0).to(tl.int64) * form.rows + tl.arange(0, form.rows)
    live = index < sizes.segments
    row = index // form.groups
    first = (index % form.groups) * form.columns
    low = tl.full((form.rows,), 0.0, tl.float32)
    high = low
    if form.kind == "dynamic":
        low, high = _extremes(t, sizes, row, first, live, form)
        tl.store(t.low + index, low, mask=live)
        tl.store(t.high + index, high, mask=live)
    scale, divisor, inverse, zero, _, _ = choose_grid(t, index, row, live, low, high, form)
    if t.operand.dtype.element_ty != tl.int8:
        tl.store(t.scale + index, scale, mask=live)
    if t.zero is not None:
        tl.store(t.zero + index, zero, mask=live)
    columns = tl.arange(0, form.block)[None, :]
    total = tl.full((form.rows, form.block), 0.0, tl.float32)
    missing = tl.full((form.rows, form.block), 0, tl.int32)
    for start in range(0, form.columns, form.block):
        mask = live[:, None] & (start + columns < form.columns)
        v = load_rows(t, sizes, row, first, start + columns, mask)
        centered = centered_codes(unclamped_codes(v, divisor, inverse, zero, form), zero, form)
        total += tl.where(mask, centered, 0.0)
        place = index[:, None] * form.columns + start + columns
        helper = None
        if t.helper is not None:
            helper = tl.load(t.helper + place, mask=mask, other=0.0)
        made = operand_of(centered, scale, zero, helper, form)
        if t.operand.dtype.element_ty == tl.int8:
            missing += (mask & (made != made)).to(tl.int32)
            tl.store(t.operand + place, tl.where(made != made, 0.0, made).to(tl.int8), mask=mask)
        else:
            tl.store(t.operand + place, to_type(made, t.operand.dtype.element_ty, _INTERPRETED), mask=mask)
    if t.operand.dtype.element_ty == tl.int8:  # an integer can't be NaN: the scale is
        has_nan = tl.reduce(missing, 1, tl.standard._sum_combine) > 0
        tl.store(t.scale + index, tl.where(has_nan, float("nan"), scale), mask=live)
    if t.row_sum is not None:  # whole numbers: exact in any order
        tl.store(t.row_sum + index, tl.reduce(total, 1, tl.standard._sum_combine), mask=live)


@triton.jit
def scales_kernel(t, sizes, form: tl.constexpr):
    """The scales of groups whose extremes are known."""
    index = tl.program_id(0).to(tl.int64) * form.rows + tl.arange(0, form.rows)
    live = index < sizes.segments
    low = tl.load(t.low + index, mask=live, other=0.0)
    high = tl.load(t.high + index, mask=live, other=0.0)
    scale, _, _, _, _, _ = choose_grid(t, index, index // form.groups, live, low, high, form)
    tl.store(t.scale + index, scale, mask=live)
