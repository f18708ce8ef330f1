"""Straight-through gradients of a group on GPUs; the formulas of qvgen.quant.ste, to the bit of csrc/cpu/fake_gradient.inl.

The order of additions is that of torch's own sum on a CPU (cascade_sum): 32 sums side by side, column k in sum k % 32; moved
up a level after every 16 runs of 32 columns, at most three levels; then sums 0 to 7, what is left of the row in registers of
8, sums 8 to 31 by eights, single columns that are left, and the eight sums from the first to the last. (Torch's own sum on a
GPU adds in an order of its own, so gradients of scales, zero points and clips differ from an unfused GPU step in last bits.)
"""

from __future__ import annotations

import triton
import triton.language as tl

from qvgen_kernels.triton.fake_quantize import (
    at_least,
    at_most,
    centered_codes,
    choose_grid,
    load_rows,
    operand_of,
    unclamped_codes,
)
from qvgen_kernels.triton.launch import INTERPRETED
from qvgen_kernels.triton.rounding import to_type

__all__ = ["fake_gradient_kernel"]

_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def _between(v, x, low, high):
    """V where low < x < high, 0 elsewhere and where x is NaN."""
    return tl.where((x > low) & (x < high), v, 0.0)


@triton.jit
def _columns(t, sizes, g, columns, mask, form: tl.constexpr):
    """x, the gradient, dx before the extremes' shares, and q - z of [rows, 32]."""
    row, first, index, divisor, inverse, zero, _, _ = g
    v = load_rows(t, sizes, row, first, columns, mask)
    grad = tl.load(t.grad + index[:, None] * form.columns + columns, mask=mask, other=0.0)
    u = unclamped_codes(v, divisor, inverse, zero, form)
    return v, grad, _between(grad, u, form.qmin - 0.5, form.qmax + 0.5), centered_codes(u, zero, form)


@triton.jit
def _add(t, sizes, g, start, live, sums, form: tl.constexpr):
    """Add what 32 columns give to (sum g (q - z), sum m g x, sum (m - 1) g, columns at the extremes)."""
    columns = start + tl.arange(0, 32)[None, :]
    mask = live[:, None] & (columns < form.columns)
    v, grad, kept, centered = _columns(t, sizes, g, columns, mask, form)
    low, high = g[6], g[7]
    at_low = tl.where(mask & (v == low[:, None]), 1, 0)
    at_high = tl.where(mask & (v == high[:, None]), 1, 0)
    if form.zero_point == "none":
        at_high = tl.where(mask & ((v == low[:, None]) | (v == high[:, None])), 1, 0)
    a, b, c, n_low, n_high = sums
    return a + grad * centered, b + kept * v, c + (kept - grad), n_low + at_low, n_high + at_high


@triton.jit
def _eight(sums, part: tl.constexpr, form: tl.constexpr):
    """Sums 8 part .. 8 part + 7 of [rows, 32]."""
    parts = tl.reshape(sums, (form.rows, 4, 8))
    chosen = tl.arange(0, 4)[None, :, None] == part
    return tl.reduce(tl.where(chosen, parts, 0.0), 1, tl.standard._sum_combine)


@triton.jit
def _one(v, place: tl.constexpr, width: tl.constexpr):
    """Column ``place`` of [rows, width]."""
    return tl.reduce(tl.where(tl.arange(0, width)[None, :] == place, v, 0.0), 1, tl.standard._sum_combine)


@triton.jit
def _total(sums, rest, form: tl.constexpr):
    """The sum of each row, from its 32 sums and what is left of it; see the file's head."""
    registers: tl.constexpr = form.registers
    first: tl.constexpr = form.registers * 8
    count: tl.constexpr = form.rest
    lanes = _eight(sums, 0, form)
    for part in tl.static_range(0, registers):
        lanes += _eight(rest, part, form)
    for part in tl.static_range(1, 4):
        lanes += _eight(sums, part, form)
    total = tl.full((form.rows,), 0.0, tl.float32)
    for place in tl.static_range(first, count):
        total += _one(rest, place, 32)
    for place in tl.static_range(0, 8):
        total += _one(lanes, place, 8)
    return total


@triton.jit
def _sum_groups(t, sizes, g, live, form: tl.constexpr):
    """The three sums of every group, and how many of its columns are at its extremes."""
    nothing = tl.full((form.rows, 32), 0.0, tl.float32)
    none = tl.full((form.rows, 32), 0, tl.int32)
    a1, b1, c1 = nothing, nothing, nothing
    a2, b2, c2 = nothing, nothing, nothing
    a3, b3, c3 = nothing, nothing, nothing
    n_low, n_high = none, none
    for level in range(form.levels):
        a, b, c = nothing, nothing, nothing
        for run in range(16):
            start = (level * 16 + run) * 32
            a, b, c, n_low, n_high = _add(t, sizes, g, start, live, (a, b, c, n_low, n_high), form)
        a1, b1, c1 = a1 + a, b1 + b, c1 + c
        if (level + 1) % 16 == 0:
            a2, b2, c2 = a2 + a1, b2 + b1, c2 + c1
            a1, b1, c1 = nothing, nothing, nothing
            if (level + 1) % 256 == 0:
                a3, b3, c3 = a3 + a2, b3 + b2, c3 + c2
                a2, b2, c2 = nothing, nothing, nothing
    a, b, c = nothing, nothing, nothing
    for run in range(form.runs):
        start = (form.levels * 16 + run) * 32
        a, b, c, n_low, n_high = _add(t, sizes, g, start, live, (a, b, c, n_low, n_high), form)
    a, b, c = ((a + a1) + a2) + a3, ((b + b1) + b2) + b3, ((c + c1) + c2) + c3
    of_a, of_b, of_c = nothing, nothing, nothing
    if form.rest:
        start = form.columns - form.rest
        of_a, of_b, of_c, n_low, n_high = _add(
            t, sizes, g, start, live, (nothing, nothing, nothing, n_low, n_high), form
        )
    at_low, at_high = (tl.reduce(n_low, 1, tl.standard._sum_combine), tl.reduce(n_high, 1, tl.standard._sum_combine))
    return _total(a, of_a, form), _total(b, of_b, form), _total(c, of_c, form), at_low, at_high


@triton.jit
def _where_free(span, grad, form: tl.constexpr):
    """0 where the scale sits on its floor or ceiling."""
    scale = tl.div_rn(span, tl.full((form.rows,), form.qmax, tl.float32))
    return _between(grad, scale, form.floor, form.ceiling)


@triton.jit
def _through_extremes(g, sums, clip_low, clip_high, scale, form: tl.constexpr):
    """The gradients of both clips, and what each column at the low and the high extreme is given."""
    divisor, low, high = g[3], g[6], g[7]
    codes, inputs, clipped, n_low, n_high = sums
    qmax = tl.full((form.rows,), form.qmax, tl.float32)
    count_low, count_high = tl.maximum(n_low, 1).to(tl.float32), tl.maximum(n_high, 1).to(tl.float32)
    grad_scale = codes - tl.div_rn(inputs, divisor)
    if form.zero_point == "none":
        grad_high = _where_free(high * clip_high, tl.div_rn(grad_scale, qmax), form)
        share = tl.div_rn(grad_high * clip_high, count_high)
        return tl.full((form.rows,), 0.0, tl.float32), grad_high * high, share, share
    grad_zero = clipped * scale
    if not form.through_zero_point:
        grad_zero = tl.full((form.rows,), 0.0, tl.float32)
    bottom, top = at_most(low, 0.0), at_least(high, 0.0)
    clipped_low, clipped_high = bottom * clip_low, top * clip_high
    grad_scale = grad_scale + tl.div_rn(grad_zero * clipped_low, scale * scale)
    grad_high = _where_free(clipped_high - clipped_low, tl.div_rn(grad_scale, qmax), form)
    grad_low = tl.div_rn(-grad_zero, scale) - grad_high
    at_low = _between(grad_low * clip_low, low, -float("inf"), 0.0)
    at_high = _between(grad_high * clip_high, high, 0.0, float("inf"))
    return grad_low * bottom, grad_high * top, tl.div_rn(at_low, count_low), tl.div_rn(at_high, count_high)


@triton.jit
def _with_shares(kept, v, low, high, at_low, at_high, form: tl.constexpr):
    """Dx of [rows, 32]: a share for every column that equals an extreme, and a zero for the others, which makes -0 a 0."""
    is_low, is_high = v == low[:, None], v == high[:, None]
    high_share = tl.where(is_high, at_high[:, None], 0.0)
    if form.zero_point == "none":
        sign = tl.where(v > 0.0, 1.0, tl.where(v < 0.0, -1.0, 0.0))
        return kept + tl.where(is_low, at_high[:, None], high_share) * sign
    return (kept + tl.where(is_low, at_low[:, None], 0.0)) + high_share


@triton.jit
def fake_gradient_kernel(t, sizes, form: tl.constexpr):
    """Gradients of ``form.rows`` groups: dx in place of the gradient, both parameters, and the operand again."""
    index = tl.program_id(0).to(tl.int64) * form.rows + tl.arange(0, form.rows)
    live = index < sizes.segments
    row = index // form.groups
    first = (index % form.groups) * form.columns
    low = tl.full((form.rows,), float("nan"), tl.float32)  # no column is equal to it
    high = low
    if form.kind == "dynamic":
        low = tl.load(t.low + index, mask=live, other=0.0)
        high = tl.load(t.high + index, mask=live, other=0.0)
    scale, divisor, inverse, zero, param_first, param_second = choose_grid(t, index, row, live, low, high, form)
    g = row, first, index, divisor, inverse, zero, low, high
    codes, inputs, clipped, n_low, n_high = _sum_groups(t, sizes, g, live, form)
    at_low, at_high = scale * 0.0, scale * 0.0
    if form.kind == "dynamic":
        sums = codes, inputs, clipped, n_low, n_high
        grad_first, grad_second, at_low, at_high = _through_extremes(g, sums, param_first, param_second, scale, form)
    else:
        grad_first = codes - tl.div_rn(inputs, divisor)
        grad_second = clipped * scale
        if form.kind == "learned":
            grad_first = grad_first * form.factor
            grad_second = grad_second * form.factor
        if form.zero_point == "none":
            grad_second = tl.full((form.rows,), 0.0, tl.float32)
    tl.store(t.grad_first + index, grad_first, mask=live)
    tl.store(t.grad_second + index, grad_second, mask=live)
    for start in range(0, form.columns, 32):
        columns = start + tl.arange(0, 32)[None, :]
        mask = live[:, None] & (columns < form.columns)
        v, _, kept, centered = _columns(t, sizes, g, columns, mask, form)
        if form.kind == "dynamic":
            kept = _with_shares(kept, v, low, high, at_low, at_high, form)
        place = index[:, None] * form.columns + columns
        tl.store(t.grad + place, kept, mask=mask)
        if t.operand is not None:
            made = operand_of(centered, scale, zero, None, form)
            tl.store(t.operand + place, to_type(made, t.operand.dtype.element_ty, _INTERPRETED), mask=mask)
