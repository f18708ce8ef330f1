"""The sums of the attention's gradient (kernels/attention.md, step 8): one kernel by queries, one by keys.

    dq^_i / lambda = sum over j of (W_ij s_j) code_j        64 queries of a program, half a block of keys after another
    dk^_j / lambda = sum over i of (W_ij s_i) code_i        64 keys of a program, 16 queries after 16
    dv^_j = sum over i of P_ij g_i

Probabilities are the forward pass's own, to the bit: its kernel is run again and leaves exponents and weights of the queries
behind, and what is relative to a block is computed once more. Tiles of the second kernel are transposed, [keys, queries], so
that each sum takes what a thread has computed. Nothing of the size tokens times tokens lies in memory, no two programs add to
one number, and so two runs have the same bits.

Matrix units multiply numbers of 11 bits (TF32). A code is one, and so are probabilities and plain values of 16 bits. The
other factor is rounded to 11 bits here, to nearest, before it is multiplied: g s_d, P_ij, W_ij s_j and W_ij s_i, scales being
multiplied into the factor that is no code, so that a card adds up exact products in float32. The sum of P dP is made of the
same rounded g s_d (attend.py): the sum over j of W_ij stays 0, as a softmax's is. Plain values of float32 are rounded too,
and not in that sum. Without rounding the gradients are as near to float64 as the reference's, 3e-5 of their length; with it
2e-3, as far as a rounding of each factor by 2^-12 reaches where the terms of W cancel down to an eighth (measured: .0003 to
.0006, and .0016 for plain values of float32).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from qvgen_kernels.attention.contract import BLOCK, SPAN, AttentionSpec
from qvgen_kernels.attention.gradient import Operands
from qvgen_kernels.attention.triton.attend import attend, attend_arguments
from qvgen_kernels.attention.triton.block import (
    ROWS,
    SMALLEST,
    block_exponent,
    constant,
    eleven_bits,
    probability_factors,
    reach,
    seen_keys,
)
from qvgen_kernels.attention.triton.form import Codes, Statistics
from qvgen_kernels.triton.launch import launch
from qvgen_kernels.triton.rounding import MAGIC, round_to_type

__all__ = ["QUERIES", "GradientForm", "GradientTensors", "key_kernel", "products", "query_kernel", "warps_of"]


QUERIES = 16
"""Queries that a program of keys takes at a time: with 32 registers spill, for heads of 64 on Ampere, of 128 on Hopper."""

_BLOCK, _ROWS = tl.constexpr(BLOCK), tl.constexpr(ROWS)
_HALF, _QUERIES = tl.constexpr(BLOCK // 2), tl.constexpr(QUERIES)
_STEP = tl.constexpr(0.5 / SPAN)


@dataclass(frozen=True)
class GradientForm:
    """Constants of the kernels.

    Attributes:
        head_size: D.
        width: Columns of the codes.
        mask: "none"; "keys": the same for all queries; "all".
        plain: Whether values are not quantized.
        interpreted: For Triton's interpreter.
    """

    head_size: int
    width: int
    mask: str
    plain: bool
    interpreted: bool


class GradientTensors(NamedTuple):
    """Pointers of the kernels.

    Attributes:
        codes: Quantized queries and keys.
        statistics: Statistics of the queries, and the gradient of the outputs.
        query_scale: float32 [heads, M].
        value: Codes of values, or plain ones, float32 [heads, N, D].
        plain: Values as they came; their type is read.
        mask: bool, or None.
        of_query: float32 [heads, M, D], filled in, as the others are.
        of_key: float32 [heads, N, D].
        of_value: float32 [heads, N, D].
    """

    codes: Any
    statistics: Any
    query_scale: Any
    value: Any
    plain: Any
    mask: Any
    of_query: Any
    of_key: Any
    of_value: Any


@triton.jit
def _scaled_gradient(t, rows, head, sizes, form: tl.constexpr):
    """Gradients of queries' outputs times the scales of values, in 11 bits."""
    g = _rows(t.statistics.grad, rows, sizes.queries, head * sizes.queries, form)
    if not form.plain:
        g = g * tl.load(t.codes.value_scale + head * form.width + tl.arange(0, form.width))[None, :]
    return eleven_bits(g)


@triton.jit
def _along(vector, axis: tl.constexpr):
    """A vector of queries beside a tile whose keys lie along an axis."""
    return vector[:, None] if axis == 1 else vector[None, :]


@triton.jit
def _exponents(z, query, axis: tl.constexpr):
    """Exponents of a block, whose keys lie along an axis, and the factors that make P of its probabilities."""
    slope, top, inverse, _ = query
    largest = tl.reduce(z, axis, tl.standard._elementwise_max)
    exponent = tl.where(largest > float("-inf"), block_exponent(largest, slope), SMALLEST)
    return exponent, reach(exponent - top) * inverse


@triton.jit
def _weights(z, slope, block, t, axis: tl.constexpr, form: tl.constexpr):
    """P of a tile: z are scores times keys' scales, -inf where a key is hidden; ``block`` as _exponents has it."""
    exponent, factor = block
    power, quotient = probability_factors(z, _along(slope, axis), _along(exponent, axis), form.plain)
    p = tl.fma(power, quotient, constant(MAGIC, z)) - MAGIC
    if form.plain:
        p = round_to_type(p, t.plain.dtype.element_ty, form.interpreted)
    return tl.where(z > float("-inf"), p, 0.0) * _along(factor, axis)


@triton.jit
def _query(t, here, live):
    """Factor, exponent, 1 / L and the sum of P dP of some queries; those that there are not have weights of 0."""
    slope = tl.load(t.codes.factor + here, mask=live, other=0.0) * -_STEP
    top = tl.load(t.statistics.top + here, mask=live, other=0.0)
    inverse = tl.load(t.statistics.inverse + here, mask=live, other=0.0)
    return slope, top, inverse, tl.load(t.statistics.expected + here, mask=live, other=0.0)


@triton.jit
def _place(rows, count, size, form: tl.constexpr):
    """Offsets of some rows of a matrix [rows, D] as [rows, width], and which of them there are; ``size`` rows lie before."""
    column = tl.arange(0, form.width)[None, :]
    return (rows + size)[:, None] * form.head_size + column, (rows < count)[:, None] & (column < form.head_size)


@triton.jit
def _rows(base, rows, count, size, form: tl.constexpr):
    """Some rows of a float32 matrix; what there is not is 0."""
    place, live = _place(rows, count, size, form)
    return tl.load(base + place, mask=live, other=0.0)


@triton.jit
def _mask_start(head, tile, sizes):
    start = (head // sizes.heads) * sizes.mask_batch + (head % sizes.heads) * sizes.mask_head
    return start + (tile * _ROWS) * (sizes.mask_query + tl.full((), 0, tl.int64))


@triton.jit
def _scores(codes, head, block, keys, t, sizes, form: tl.constexpr):
    """Scores of queries with some keys of a block times the keys' scales; codes and scales of the keys."""
    index = head * sizes.blocks + block
    column = tl.arange(0, form.width)[None, :]
    k = tl.load(t.codes.key + index * (_BLOCK * form.width) + keys[:, None] * form.width + column)
    scale = tl.load(t.codes.key_scale + index * _BLOCK + keys)
    return tl.dot(codes, k.T, out_dtype=tl.int32).to(tl.float32) * scale[None, :], k, scale


@triton.jit
def _add_block(total, tile, block, t, sizes, form: tl.constexpr):
    """Sums of queries with a block of keys added: its exponents by all 64 keys, all else by half of them."""
    codes, g, query, place = tile
    head = place[0]
    index, every = head * sizes.blocks + block, tl.arange(0, _BLOCK)
    scores, _, _ = _scores(codes, head, block, every, t, sizes, form)
    shown = seen_keys(t, place, index, every[None, :], sizes, form)
    found = _exponents(tl.where(shown, scores, float("-inf")), query, 1)
    for part in tl.range(0, 2, loop_unroll_factor=1):
        keys = tl.arange(0, _HALF) + part * _HALF
        z, k, scale = _scores(codes, head, block, keys, t, sizes, form)
        seen = seen_keys(t, place, index, keys[None, :], sizes, form)
        p = _weights(tl.where(seen, z, float("-inf")), query[0], found, t, 1, form)
        v = eleven_bits(_rows(t.value, keys + block * _BLOCK, sizes.keys, head * sizes.keys, form))
        w = p * (tl.dot(g, v.T, input_precision="tf32") - query[3][:, None])
        total = tl.dot(eleven_bits(w * scale[None, :]), k.to(tl.float32), total, input_precision="tf32")
    return total


@triton.jit
def query_kernel(t, sizes, form: tl.constexpr):
    """Sums for the gradient of 64 queries of a head."""
    tiles = (sizes.queries + _ROWS - 1) // _ROWS
    head, tile = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    row, column = tile * _ROWS + tl.arange(0, _ROWS), tl.arange(0, form.width)[None, :]
    live, here = row < sizes.queries, head * sizes.queries + row
    codes = tl.load(t.codes.query + here[:, None] * form.width + column, mask=live[:, None], other=0)
    place = (head, row, _mask_start(head, tile, sizes))
    own = (codes, _scaled_gradient(t, row, head, sizes, form), _query(t, here, live), place)
    total = tl.full((_ROWS, form.width), 0.0, tl.float32)
    for block in range(sizes.blocks):
        total = _add_block(total, own, block, t, sizes, form)
    target, live = _place(row, sizes.queries, head * sizes.queries, form)
    tl.store(t.of_query + target, total, mask=live)


@triton.jit
def _add_queries(totals, block, tile, t, sizes, form: tl.constexpr):
    """Sums of a block of keys, and of their values, with 16 queries added."""
    of_key, of_value = totals
    k, scale, v, head, index = block
    row, column, key = tl.arange(0, _QUERIES) + tile * _QUERIES, tl.arange(0, form.width)[None, :], tl.arange(0, _BLOCK)
    live, here = row < sizes.queries, head * sizes.queries + row
    codes = tl.load(t.codes.query + here[:, None] * form.width + column, mask=live[:, None], other=0)
    query = _query(t, here, live)
    z = tl.dot(k, codes.T, out_dtype=tl.int32).to(tl.float32) * scale[:, None]
    seen = seen_keys(
        t, (head, row, _mask_start(head, tile // (_ROWS // _QUERIES), sizes)), index, key[None, :], sizes, form
    )
    z = tl.where(seen.T, z, float("-inf"))
    p = _weights(z, query[0], _exponents(z, query, 0), t, 0, form)
    g = _scaled_gradient(t, row, head, sizes, form)
    of_value = tl.dot(eleven_bits(p), g, of_value, input_precision="tf32")
    w = p * (tl.dot(v, g.T, input_precision="tf32") - query[3][None, :])
    w = w * tl.load(t.query_scale + here, mask=live, other=0.0)[None, :]
    return tl.dot(eleven_bits(w), codes.to(tl.float32), of_key, input_precision="tf32"), of_value


@triton.jit
def key_kernel(t, sizes, form: tl.constexpr):
    """Sums for the gradients of 64 keys and values of a head."""
    index, head = tl.program_id(0).to(tl.int64), (tl.program_id(0) // sizes.blocks).to(tl.int64)
    column, key = tl.arange(0, form.width)[None, :], tl.arange(0, _BLOCK)
    token = key + (tl.program_id(0) % sizes.blocks) * _BLOCK
    k = tl.load(t.codes.key + index * (_BLOCK * form.width) + key[:, None] * form.width + column)
    scale = tl.load(t.codes.key_scale + index * _BLOCK + key)
    v = eleven_bits(_rows(t.value, token, sizes.keys, head * sizes.keys, form))
    totals = (tl.full((_BLOCK, form.width), 0.0, tl.float32), tl.full((_BLOCK, form.width), 0.0, tl.float32))
    for tile in range((sizes.queries + _QUERIES - 1) // _QUERIES):
        totals = _add_queries(totals, (k, scale, v, head, index), tile, t, sizes, form)
    of_key, of_value = totals
    if not form.plain:  # whose scales are in g
        value_scale = tl.load(t.codes.value_scale + head * form.width + tl.arange(0, form.width))
        of_value = tl.div_rn(of_value, tl.broadcast_to(value_scale[None, :], of_value.shape))
    target, live = _place(token, sizes.keys, head * sizes.keys, form)
    tl.store(t.of_key + target, of_key, mask=live)
    tl.store(t.of_value + target, of_value, mask=live)


def warps_of(width: int) -> int:
    """Warps of a program, in whose registers lie a tile's products and one or two float32 sums of 64 rows."""
    return 4 if width <= 64 else 8


def products(
    grad: Tensor, operands: Operands, codes: Codes, *, value: Tensor, mask: Tensor | None, spec: AttentionSpec
) -> tuple[Tensor, Tensor, Tensor]:
    """dq^ / lambda, dk^ / lambda and dv^, float32, as :data:`~qvgen_kernels.attention.gradient.Products`.

    Args:
        grad: Gradient of the outputs, float32 [B, H, M, D], contiguous; M > 0.
        operands: Quantized queries, keys and values.
        codes: The same as the forward pass has them.
        value: Values [B, H, N, D] of that pass; N > 0.
        mask: bool, [B, H, M, N] or 1 in place of any of these sizes; None: every key is seen.
        spec: The attention.
    """
    forward, sizes, form = attend_arguments(codes, value, queries=grad.shape[2], mask=mask, spec=spec)
    found = Statistics(grad, *(grad.new_empty(codes.query.shape[:2]) for _ in range(3)))
    attend(forward._replace(statistics=found), sizes, form)
    sums = (torch.empty_like(grad), *(grad.new_empty(value.shape) for _ in range(2)))
    scale, values = operands.query.scale.contiguous(), operands.value.codes.contiguous()
    t = GradientTensors(codes, found, scale, values, forward.value, forward.mask, *sums)
    own = GradientForm(form.head_size, form.width, form.mask, form.plain, form.interpreted)
    heads, options = codes.query.shape[0], {"on": grad, "num_warps": warps_of(form.width), "num_stages": 1}
    launch(query_kernel, (heads * triton.cdiv(sizes.queries, ROWS),), t, sizes, own, **options)
    launch(key_kernel, (heads * sizes.blocks,), t, sizes, own, **options)
    return sums
