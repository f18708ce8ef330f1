"""The sums of the attention's gradient (kernels/attention.md, step 8): one kernel by queries, one by keys.

    dq^_i / lambda = sum over j of (W_ij s_j) code_j        64 queries of a program, block after block of keys
    dk^_j / lambda = sum over i of (W_ij s_i) code_i        64 keys of a program, 64 queries after 64
    dv^_j = sum over i of P_ij g_i

Probabilities are the forward pass's own, to the bit: its kernel is run again and leaves exponents and weights of the queries
behind, and what is relative to a block is computed once more. Tiles of the second kernel are transposed, [keys, queries], so
that each sum takes what a thread has computed. Nothing of the size tokens times tokens lies in memory, no two programs add to
one number, and so two runs have the same bits.

Scales of keys and queries are multiplied into W, because then one factor of these products is a code, which TF32 holds. Sums
are float32, in the order of the matrix units within 64 numbers and one tile after another beyond. Without TF32 (torch's
setting for products of float32) a product is three of TF32 ("tf32x3"), which leaves about 2^-21 of it; on AMD cards IEEE.
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
    probability_factors,
    reach,
    seen_keys,
)
from qvgen_kernels.attention.triton.form import Codes, Statistics
from qvgen_kernels.triton.launch import launch
from qvgen_kernels.triton.rounding import MAGIC, round_to_type

__all__ = ["GradientForm", "GradientTensors", "key_kernel", "products", "query_kernel", "warps_of"]

_BLOCK, _ROWS = tl.constexpr(BLOCK), tl.constexpr(ROWS)
_STEP = tl.constexpr(0.5 / SPAN)


@dataclass(frozen=True)
class GradientForm:
    """Constants of the kernels.

    Attributes:
        head_size: D.
        width: Columns of the codes.
        mask: "none"; "keys": the same for all queries; "all".
        plain: Whether values are not quantized.
        precision: How Triton multiplies float32 numbers.
        interpreted: For Triton's interpreter.
    """

    head_size: int
    width: int
    mask: str
    plain: bool
    precision: str
    interpreted: bool


class GradientTensors(NamedTuple):
    """Pointers of the kernels.

    Attributes:
        codes: Quantized queries and keys.
        statistics: Those of the queries, and the gradient of the outputs.
        query_scale: float32 [heads, M].
        value: Dequantized values, float32 [heads, N, D].
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
def _along(vector, axis: tl.constexpr):
    """A vector of queries beside a tile whose keys lie along an axis."""
    return vector[:, None] if axis == 1 else vector[None, :]


@triton.jit
def _weights(z, query, t, axis: tl.constexpr, form: tl.constexpr):
    """P of a tile, whose keys lie along an axis: z are scores times keys' scales, -inf where a key is hidden."""
    slope, top, inverse, _ = query
    largest = tl.reduce(z, axis, tl.standard._elementwise_max)
    exponent = tl.where(largest > float("-inf"), block_exponent(largest, slope), SMALLEST)
    power, quotient = probability_factors(z, _along(slope, axis), _along(exponent, axis), form.plain)
    p = tl.fma(power, quotient, constant(MAGIC, z)) - MAGIC
    if form.plain:
        p = round_to_type(p, t.plain.dtype.element_ty, form.interpreted)
    return tl.where(z > float("-inf"), p, 0.0) * _along(reach(exponent - top) * inverse, axis)


@triton.jit
def _query(t, here, live):
    """Factor, exponent, 1 / L and the sum of P dP of some queries; those that there are not have weights of 0."""
    slope = tl.load(t.codes.factor + here, mask=live, other=0.0) * -_STEP
    top = tl.load(t.statistics.top + here, mask=live, other=0.0)
    inverse = tl.load(t.statistics.inverse + here, mask=live, other=0.0)
    return slope, top, inverse, tl.load(t.statistics.expected + here, mask=live, other=0.0)


@triton.jit
def _rows(base, first, count, size, form: tl.constexpr):
    """64 rows of a float32 matrix [rows, D] from one on, as [64, width]; what there is not is 0."""
    row, column = tl.arange(0, _ROWS) + first, tl.arange(0, form.width)[None, :]
    live = (row < count)[:, None] & (column < form.head_size)
    return tl.load(base + (row + size)[:, None] * form.head_size + column, mask=live, other=0.0)


@triton.jit
def _store(base, total, first, count, size, form: tl.constexpr):
    row, column = tl.arange(0, _ROWS) + first, tl.arange(0, form.width)[None, :]
    live = (row < count)[:, None] & (column < form.head_size)
    tl.store(base + (row + size)[:, None] * form.head_size + column, total, mask=live)


@triton.jit
def _mask_start(head, tile, sizes):
    start = (head // sizes.heads) * sizes.mask_batch + (head % sizes.heads) * sizes.mask_head
    return start + (tile * _ROWS) * (sizes.mask_query + tl.full((), 0, tl.int64))


@triton.jit
def query_kernel(t, sizes, form: tl.constexpr):
    """Sums for the gradient of 64 queries of a head."""
    tiles = (sizes.queries + _ROWS - 1) // _ROWS
    head, tile = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    row, column, key = tile * _ROWS + tl.arange(0, _ROWS), tl.arange(0, form.width)[None, :], tl.arange(0, _BLOCK)
    live, here = row < sizes.queries, head * sizes.queries + row
    codes = tl.load(t.codes.query + here[:, None] * form.width + column, mask=live[:, None], other=0)
    query = _query(t, here, live)
    g = _rows(t.statistics.grad, tile * _ROWS, sizes.queries, head * sizes.queries, form)
    total = tl.full((_ROWS, form.width), 0.0, tl.float32)
    for block in range(sizes.blocks):
        index = head * sizes.blocks + block
        k = tl.load(t.codes.key + index * (_BLOCK * form.width) + key[:, None] * form.width + column)
        scale = tl.load(t.codes.key_scale + index * _BLOCK + key)
        z = tl.dot(codes, k.T, out_dtype=tl.int32).to(tl.float32) * scale[None, :]
        seen = seen_keys(t, (head, row, _mask_start(head, tile, sizes)), index, sizes, form)
        p = _weights(tl.where(seen, z, float("-inf")), query, t, 1, form)
        v = _rows(t.value, block * _BLOCK, sizes.keys, head * sizes.keys, form)
        w = p * (tl.dot(g, v.T, input_precision=form.precision) - query[3][:, None])
        total = tl.dot(w * scale[None, :], k.to(tl.float32), total, input_precision=form.precision)
    _store(t.of_query, total, tile * _ROWS, sizes.queries, head * sizes.queries, form)


@triton.jit
def key_kernel(t, sizes, form: tl.constexpr):
    """Sums for the gradients of 64 keys and values of a head."""
    head = (tl.program_id(0) // sizes.blocks).to(tl.int64)
    index, block = tl.program_id(0).to(tl.int64), tl.program_id(0) % sizes.blocks
    column, key = tl.arange(0, form.width)[None, :], tl.arange(0, _BLOCK)
    k = tl.load(t.codes.key + index * (_BLOCK * form.width) + key[:, None] * form.width + column)
    scale = tl.load(t.codes.key_scale + index * _BLOCK + key)
    v = _rows(t.value, block * _BLOCK, sizes.keys, head * sizes.keys, form)
    of_key = tl.full((_BLOCK, form.width), 0.0, tl.float32)
    of_value = tl.full((_BLOCK, form.width), 0.0, tl.float32)
    for tile in range((sizes.queries + _ROWS - 1) // _ROWS):
        row = tl.arange(0, _ROWS) + tile * _ROWS
        live, here = row < sizes.queries, head * sizes.queries + row
        codes = tl.load(t.codes.query + here[:, None] * form.width + column, mask=live[:, None], other=0)
        query_scale = tl.load(t.query_scale + here, mask=live, other=0.0)
        query = _query(t, here, live)
        z = tl.dot(k, codes.T, out_dtype=tl.int32).to(tl.float32) * scale[:, None]
        seen = seen_keys(t, (head, row, _mask_start(head, tile, sizes)), index, sizes, form)
        p = _weights(tl.where(seen.T, z, float("-inf")), query, t, 0, form)
        g = _rows(t.statistics.grad, tile * _ROWS, sizes.queries, head * sizes.queries, form)
        of_value = tl.dot(p, g, of_value, input_precision=form.precision)
        w = p * (tl.dot(v, g.T, input_precision=form.precision) - query[3][None, :])
        of_key = tl.dot(w * query_scale[None, :], codes.to(tl.float32), of_key, input_precision=form.precision)
    _store(t.of_key, of_key, block * _BLOCK, sizes.keys, head * sizes.keys, form)
    _store(t.of_value, of_value, block * _BLOCK, sizes.keys, head * sizes.keys, form)


def warps_of(width: int) -> int:
    """Warps of a program: 64 x 64 products and one or two float32 sums of 64 rows lie in their registers."""
    return 4 if width <= 64 else 8


def _precision() -> str:
    if torch.backends.cuda.matmul.allow_tf32:
        return "tf32"
    return "ieee" if torch.version.hip is not None else "tf32x3"


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
    scale, values = operands.query.scale.contiguous(), operands.value.dequantized.contiguous()
    t = GradientTensors(codes, found, scale, values, forward.value, forward.mask, *sums)
    own = GradientForm(form.head_size, form.width, form.mask, form.plain, _precision(), form.interpreted)
    heads, warps = codes.query.shape[0], warps_of(form.width)
    options = {"on": grad, "num_warps": warps, "num_stages": 1}
    launch(query_kernel, (heads * triton.cdiv(sizes.queries, ROWS),), t, sizes, own, **options)
    launch(key_kernel, (heads * sizes.blocks,), t, sizes, own, **options)
    return sums
