"""Scores, probabilities and running sums (kernels/attention.md, steps 3 to 7) of 64 queries, block after block of keys.

Where the contract fuses a product and a sum, so does this. Elsewhere every line is one float32 operation; where a
multiply-add stands for two, its product is exact, being one with a power of two, so that the sum is rounded as if it stood
alone. Sums are rescaled in blocks where a query of the tile meets a larger exponent; with a factor of 1 the contract's
rescaling changes no bit, because no sum but 0 is below 2^-100: it was kept at that size, or it is a number of 24 bits plus a
multiple of 2^-64, which leaves nothing below 2^-88.

Plain values (``int8_qk``) are multiplied by probabilities of their type, float32 numbers without TF32. The card adds these
products in an order of its own, so that their sums are not the reference's to the bit (kernels/attention.md, step 5).

A block without a key that a query sees has the exponent -inf, here the smallest finite number: its codes are 0, and so is
all that it adds.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from qvgen_kernels.attention.contract import BLOCK, SPAN, AttentionSpec
from qvgen_kernels.attention.triton.block import (
    ROWS,
    SMALLEST,
    block_exponent,
    constant,
    dropped,
    eleven_bits,
    probability_factors,
    reach,
    seen_keys,
)
from qvgen_kernels.attention.triton.form import AttendForm, AttendSizes, AttendTensors, Codes, attend_form
from qvgen_kernels.triton.launch import INTERPRETED, launch
from qvgen_kernels.triton.rounding import MAGIC, to_type

__all__ = ["ROWS", "STAGES", "WARPS", "attend", "attend_arguments", "attend_kernel"]

WARPS = 4
STAGES = 3
"""Blocks of keys and values in flight, and one."""

_FARTHEST = 1 << 24
"""A mask whose queries or keys lie this far apart is copied: 63 times both are an int32."""

_BLOCK = tl.constexpr(BLOCK)
_STEP = tl.constexpr(0.5 / SPAN)
_MAGIC_BITS = tl.constexpr(0x4B400000)
_WRAPPED = tl.constexpr((0x4B400000 * BLOCK + 2**31) % 2**32 - 2**31)
"""The sum of the bits of 1.5 * 2^23 over a block, as int32."""
_ROWS = tl.constexpr(ROWS)


@triton.jit
def _operand(p):
    """Codes as signed bytes [rows, 64], in the order of the values' tokens."""
    parts = tl.permute(tl.reshape(p.to(tl.int8), (_ROWS, 4, 2, 4, 2)), (0, 1, 3, 2, 4))
    return tl.reshape(parts, (_ROWS, _BLOCK))


@triton.jit
def _plain_sums(p, place, index, column, t, sizes, form: tl.constexpr):
    """Sums of a block's probabilities, of the values' type, times some columns of plain values."""
    head, _, _ = place
    first = (index - head * sizes.blocks) * _BLOCK
    step = tl.arange(0, _BLOCK)
    start = (head // sizes.heads) * sizes.value_batch + (head % sizes.heads) * sizes.value_head
    v = t.value + start + first * sizes.value_token + step[:, None] * sizes.value_token + column[None, :]
    live = (step < (sizes.keys - first).to(tl.int32))[:, None] & (column < form.head_size)[None, :]
    values = tl.load(v, mask=live, other=0.0)
    if form.interpreted:  # the interpreter multiplies the bits of bfloat16
        p, values = p.to(tl.float32), values.to(tl.float32)
    return tl.dot(p, values, out_dtype=tl.float32, input_precision="ieee")


@triton.jit
def _add_values(totals, p, factors, where, t, sizes, form: tl.constexpr):
    """The running sums of all parts, rescaled, with a block's sums added."""
    (shrink, grow), (place, index) = factors, where
    operand = p if form.plain else _operand(p)
    is_rescaled = tl.reduce(shrink, 0, tl.standard._elementwise_min) < 1.0
    key = tl.arange(0, _BLOCK)[None, :]
    added = ()
    parts: tl.constexpr = form.parts
    for part in tl.static_range(parts):
        column = part * form.part + tl.arange(0, form.part)
        if form.plain:
            sums = _plain_sums(p, place, index, column, t, sizes, form)
        else:
            v = tl.load(t.codes.value + index * (_BLOCK * form.width) + column[:, None] * _BLOCK + key)
            base = tl.load(t.codes.base + index * form.width + column)
            start = tl.broadcast_to(base[None, :], (_ROWS, form.part))
            sums = tl.dot(operand, v.T, start, out_dtype=tl.int32).to(tl.float32, bitcast=True) - MAGIC
        total = totals[part]
        if is_rescaled:
            total = dropped(total * shrink[:, None])
        added = added + (tl.fma(sums, tl.broadcast_to(grow[:, None], sums.shape), total),)  # noqa: RUF005 - Triton's tuple
    return added


@triton.jit
def _add_block(state, query, block, t, sizes, form: tl.constexpr, masked: tl.constexpr):
    """The running sums of all parts [rows, columns], weights and exponents [rows], with a block of keys added."""
    totals, weight, top = state
    codes, slope, place = query
    index = place[0] * sizes.blocks + block
    column, key = tl.arange(0, form.width)[None, :], tl.arange(0, _BLOCK)
    k = tl.load(t.codes.key + index * (_BLOCK * form.width) + key[:, None] * form.width + column)
    scores = tl.dot(codes, k.T, out_dtype=tl.int32).to(tl.float32)
    z = scores * tl.load(t.codes.key_scale + index * _BLOCK + key)[None, :]
    if masked:
        seen = seen_keys(t, place, index, tl.arange(0, _BLOCK)[None, :], sizes, form)
        z = tl.where(seen, z, float("-inf"))
    largest = tl.reduce(z, 1, tl.standard._elementwise_max)
    exponent = block_exponent(largest, slope)
    power, quotient = probability_factors(z, slope[:, None], exponent[:, None], form.plain)
    p = tl.fma(power, quotient, constant(MAGIC if form.plain else MAGIC - 128.0, z))
    p = p - MAGIC if form.plain else p.to(tl.int32, bitcast=True)
    if masked:
        p = tl.where(seen, p, 0.0 if form.plain else _MAGIC_BITS - 128)
        exponent = tl.where(largest > float("-inf"), exponent, SMALLEST)

    highest = tl.maximum(top, exponent)
    shrink, grow = reach(top - highest), reach(exponent - highest)
    if form.plain:
        p = to_type(p, t.value.dtype.element_ty, form.interpreted)
        p_sum = tl.reduce(p.to(tl.float32), 1, tl.standard._sum_combine)  # of whole numbers below 2^22: exact
    else:
        # 64 times the bits of 1.5 * 2^23 are a multiple of 2^28: what the sum wraps to.
        p_sum = (tl.reduce(p, 1, tl.standard._sum_combine) + (128 * _BLOCK - _WRAPPED)).to(tl.float32)
    weight = dropped(weight * shrink) + p_sum * grow
    return _add_values(totals, p, (shrink, grow), (place, index), t, sizes, form), weight, highest


@triton.jit
def _finish(state, query, t, sizes, form: tl.constexpr):
    """Outputs of the tile."""
    totals, weight, _ = state
    _, slope, place = query
    head, row, _ = place
    lonely = weight == 0.0
    inverse = tl.div_rn(tl.full((_ROWS,), 1.0, tl.float32), tl.where(lonely, 1.0, weight))
    is_finite = slope == slope
    kind: tl.constexpr = t.y.dtype.element_ty
    parts: tl.constexpr = form.parts
    for part in tl.static_range(parts):
        column = part * form.part + tl.arange(0, form.part)
        y = totals[part] * inverse[:, None]
        if not form.plain:
            scale = tl.load(t.codes.value_scale + head * form.width + column)[None, :]
            y = y * scale + tl.load(t.codes.mean + head * form.width + column)[None, :]
        y = tl.where(is_finite[:, None], tl.where(lonely[:, None], 0.0, y), float("nan"))
        target = t.y + (head * sizes.queries + row)[:, None] * form.head_size + column[None, :]
        live = (row < sizes.queries)[:, None] & (column < form.head_size)[None, :]
        tl.store(target, to_type(y, kind, form.interpreted), mask=live)


@triton.jit
def _finish_statistics(state, query, t, sizes, form: tl.constexpr):
    """Exponents, 1 / L and sums of P dP over keys, which a backward pass takes of each query (step 8)."""
    totals, weight, top = state
    _, _, place = query
    head, row, _ = place
    inverse = tl.div_rn(tl.full((_ROWS,), 1.0, tl.float32), tl.where(weight == 0.0, 1.0, weight))
    expected = tl.full((_ROWS,), 0.0, tl.float32)
    live, here = row < sizes.queries, head * sizes.queries + row
    parts: tl.constexpr = form.parts
    for part in tl.static_range(parts):
        column = part * form.part + tl.arange(0, form.part)
        grad = t.statistics.grad + here[:, None] * form.head_size + column[None, :]
        g = tl.load(grad, mask=live[:, None] & (column < form.head_size)[None, :], other=0.0)
        if not form.plain:
            g = g * tl.load(t.codes.value_scale + head * form.width + column)[None, :]
        expected += tl.reduce(eleven_bits(g) * (totals[part] * inverse[:, None]), 1, tl.standard._sum_combine)
    tl.store(t.statistics.top + here, top, mask=live)
    tl.store(t.statistics.inverse + here, inverse, mask=live)
    tl.store(t.statistics.expected + here, expected, mask=live)


@triton.jit
def attend_kernel(t, sizes, form: tl.constexpr):
    """Outputs of 64 queries of a head, or their statistics; neighbouring programs share its keys and values."""
    tiles = (sizes.queries + _ROWS - 1) // _ROWS
    program = tl.program_id(0)
    head = (program // tiles).to(tl.int64)
    row = (program % tiles) * _ROWS + tl.arange(0, _ROWS)
    live = row < sizes.queries
    column = tl.arange(0, form.width)[None, :]
    here = head * sizes.queries + row
    codes = tl.load(t.codes.query + here[:, None] * form.width + column, mask=live[:, None], other=0)
    slope = tl.load(t.codes.factor + here, mask=live, other=0.0) * -_STEP
    start = (head // sizes.heads) * sizes.mask_batch + (head % sizes.heads) * sizes.mask_head
    start += (program % tiles).to(tl.int64) * _ROWS * sizes.mask_query
    query = (codes, slope, (head, row, start))
    totals = ()
    parts: tl.constexpr = form.parts
    for _ in tl.static_range(parts):
        totals = totals + (tl.full((_ROWS, form.part), 0.0, tl.float32),)  # noqa: RUF005 - Triton's tuple
    weight = tl.full((_ROWS,), 0.0, tl.float32)
    top = tl.full((_ROWS,), SMALLEST, tl.float32)
    state = (totals, weight, top)
    masked: tl.constexpr = form.mask != "none"
    whole = sizes.blocks - 1 if form.ragged else sizes.blocks
    for block in range(whole):
        state = _add_block(state, query, block, t, sizes, form, masked)
    if form.ragged:
        state = _add_block(state, query, whole, t, sizes, form, True)
    if t.statistics is not None:
        _finish_statistics(state, query, t, sizes, form)
    else:
        _finish(state, query, t, sizes, form)


def attend_arguments(
    codes: Codes, value: Tensor, *, queries: int, mask: Tensor | None, spec: AttentionSpec
) -> tuple[AttendTensors, AttendSizes, AttendForm]:
    """Pointers, sizes and constants of a launch without what it fills in.

    Args:
        codes: Quantized queries, keys and values.
        value: Values [B, H, N, D], N > 0; read where they are plain.
        queries: M.
        mask: bool, [B, H, M, N] or 1 in place of any of these sizes; None: every query sees every key.
        spec: The attention.
    """
    kind, strides = "none", (0, 0, 0, 0)
    if mask is not None:
        mask = mask if max(mask.stride()[2:]) < _FARTHEST else mask.contiguous()
        strides = tuple(0 if size == 1 else step for size, step in zip(mask.shape, mask.stride(), strict=True))
        kind = "all" if strides[2] else "keys"
    keys, plain = value.shape[2], codes.value is None
    form = attend_form(spec.head_size, keys=keys, mask=kind, plain=plain, interpreted=INTERPRETED)
    sizes = AttendSizes(value.shape[1], queries, keys, triton.cdiv(keys, BLOCK), *strides)
    if not plain:
        return AttendTensors(codes, None, mask), sizes, form
    value = value if value.stride(3) == 1 and value.stride(2) < _FARTHEST else value.contiguous()
    sizes = sizes._replace(**dict(zip(("value_batch", "value_head", "value_token"), value.stride()[:3], strict=True)))
    return AttendTensors(codes, None, mask, value), sizes, form


def attend(t: AttendTensors, sizes: AttendSizes, form: AttendForm) -> None:
    """Fill in the outputs, or the statistics, of arguments that have them."""
    tiles = t.codes.query.shape[0] * triton.cdiv(sizes.queries, ROWS)
    launch(attend_kernel, (tiles,), t, sizes, form, on=t.codes.query, num_warps=WARPS, num_stages=STAGES)
