"""Queries, keys and values to codes and scales (kernels/attention.md, steps 1 and 2), in the order that the contract states.

A column's largest magnitude after its mean is subtracted is that of its largest or its smallest number, because rounding a
difference keeps order. So one pass over the tokens finds the sums and the extremes, and a second one writes codes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qvgen_kernels.attention.contract import BLOCK, LARGEST_KEY, LARGEST_VALUE, AttentionSpec, AttentionTensors
from qvgen_kernels.attention.triton.form import Codes, TokenForm, TokenSizes, TokenTensors, token_form
from qvgen_kernels.triton.launch import launch
from qvgen_kernels.triton.rounding import MAGIC

__all__ = ["means_kernel", "quantize", "sums_kernel", "tokens_kernel", "values_kernel"]

_BLOCK = tl.constexpr(BLOCK)
_MAGIC_BITS = tl.constexpr(0x4B400000)


@triton.jit
def _start(head, sizes):
    """Offset of a head in x."""
    return (head // sizes.heads) * sizes.x_batch + (head % sizes.heads) * sizes.x_head


@triton.jit
def _scale_of(largest):
    """The scale of a largest magnitude, and its reciprocal; a NaN stays one."""
    scale = tl.div_rn(largest, tl.full(largest.shape, 127.0, tl.float32))
    scale = tl.where(scale < 1e-8, 1e-8, scale)
    return scale, tl.div_rn(tl.full(largest.shape, 1.0, tl.float32), scale)


@triton.jit
def _code_of(v, inverse):
    """Codes as int32: clamped and then rounded by the bits of a sum."""
    scaled = tl.minimum(tl.maximum(v * inverse, -127.0), 127.0)
    return (scaled + MAGIC).to(tl.int32, bitcast=True) - _MAGIC_BITS


@triton.jit
def sums_kernel(t, sizes, form: tl.constexpr):
    """Sums of ``form.tokens`` blocks of 64 tokens, one token after another, and the extremes of their columns."""
    unit = tl.program_id(0).to(tl.int64) * form.tokens + tl.arange(0, form.tokens)
    column = tl.arange(0, form.width)[None, :]
    live = unit < sizes.all_heads * sizes.blocks
    first = (unit % sizes.blocks) * _BLOCK
    x = t.x + _start(unit // sizes.blocks, sizes)[:, None] + column * sizes.x_column
    mask = live[:, None] & (column < form.head_size)
    total = tl.load(x + first[:, None] * sizes.x_token, mask=mask, other=0.0).to(tl.float32)
    low = total
    high = total
    for step in tl.range(1, _BLOCK, loop_unroll_factor=7):
        token = first + step
        last = tl.minimum(token, sizes.tokens - 1)
        v = tl.load(x + last[:, None] * sizes.x_token, mask=mask, other=0.0).to(tl.float32)
        total = tl.where((token < sizes.tokens)[:, None], total + v, total)
        low = tl.minimum(low, v)
        high = tl.maximum(high, v)
    place = unit[:, None] * form.width + column
    tl.store(t.partial + place, total, mask=live[:, None])
    if t.low is not None:
        tl.store(t.low + place, low, mask=live[:, None])
        tl.store(t.high + place, high, mask=live[:, None])


@triton.jit
def means_kernel(t, sizes, form: tl.constexpr):
    """Means of a head's columns and, where their extremes are there, their scales."""
    head = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, form.width)
    first = head * sizes.blocks * form.width + column
    total = tl.full((form.width,), 0.0, tl.float32)
    low = tl.full((form.width,), float("inf"), tl.float32)
    high = tl.full((form.width,), float("-inf"), tl.float32)
    for block in tl.range(0, sizes.blocks, loop_unroll_factor=8):
        place = first + block * form.width
        total += tl.load(t.partial + place)
        if t.low is not None:
            low = tl.minimum(low, tl.load(t.low + place))
            high = tl.maximum(high, tl.load(t.high + place))
    mean = tl.div_rn(total, tl.full((form.width,), sizes.tokens, tl.float32))
    tl.store(t.mean + head * form.width + column, mean)
    if t.scale is not None:
        # A NaN or an infinity among the numbers makes a mean that is none either.
        scale, _ = _scale_of(tl.maximum(tl.abs(low - mean), tl.abs(high - mean)))
        scale = tl.where(tl.abs(mean) < float("inf"), scale, float("nan"))
        tl.store(t.scale + head * form.width + column, scale)


@triton.jit
def tokens_kernel(t, sizes, form: tl.constexpr):
    """Codes and scales of ``form.tokens`` queries or keys of a head; tokens from T on have the code and the scale 0."""
    over = (sizes.padded + form.tokens - 1) // form.tokens
    program = tl.program_id(0).to(tl.int64)
    head = program // over
    token = (program % over) * form.tokens + tl.arange(0, form.tokens)
    column = tl.arange(0, form.width)[None, :]
    mask = (token < sizes.tokens)[:, None] & (column < form.head_size)
    place = _start(head, sizes) + token[:, None] * sizes.x_token + column * sizes.x_column
    v = tl.load(t.x + place, mask=mask, other=0.0).to(tl.float32)
    if t.mean is not None:
        v = tl.where(mask, v - tl.load(t.mean + head * form.width + column), 0.0)
    bits = v.to(tl.int32, bitcast=True) & 0x7FFFFFFF  # a NaN is larger than every number
    largest = tl.reduce(bits, 1, tl.standard._elementwise_max).to(tl.float32, bitcast=True)
    if t.clip is not None:
        largest = largest * tl.load(t.clip + head % sizes.heads)
    scale, inverse = _scale_of(largest)
    written = token < sizes.padded
    codes = t.codes + (head * sizes.padded + token)[:, None] * form.width + column
    tl.store(codes, _code_of(v, inverse[:, None]).to(tl.int8), mask=written[:, None])
    scale = tl.where(token < sizes.tokens, scale * sizes.factor, 0.0)
    tl.store(t.scale + head * sizes.padded + token, scale, mask=written)


@triton.jit
def values_kernel(t, sizes, form: tl.constexpr):
    """Codes of a block of values, transposed, and where the sums of the block start (form.py)."""
    block = tl.program_id(0).to(tl.int64)
    head = block // sizes.blocks
    column = tl.arange(0, form.width)
    place = tl.arange(0, _BLOCK)
    token = (block % sizes.blocks) * _BLOCK + ((place & 49) | ((place & 12) >> 1) | ((place & 2) << 2))
    mask = (column < form.head_size)[:, None] & (token < sizes.tokens)[None, :]
    x = t.x + _start(head, sizes) + token[None, :] * sizes.x_token + column[:, None] * sizes.x_column
    mean = tl.load(t.mean + head * form.width + column)[:, None]
    v = tl.where(mask, tl.load(x, mask=mask, other=0.0).to(tl.float32) - mean, 0.0)
    scale = tl.load(t.scale + head * form.width + column)
    inverse = tl.div_rn(tl.full((form.width,), 1.0, tl.float32), scale)
    code = _code_of(v, inverse[:, None])
    tl.store(t.codes + (block * form.width + column)[:, None] * _BLOCK + place[None, :], code.to(tl.int8))
    total = tl.reduce(code, 1, tl.standard._sum_combine)
    tl.store(t.base + block * form.width + column, 128 * total + _MAGIC_BITS)


def _sizes(x: Tensor, *, padded: int = 0, factor: float = 1.0) -> TokenSizes:
    batch, heads, tokens, _ = x.shape
    return TokenSizes(batch * heads, heads, tokens, padded, triton.cdiv(tokens, BLOCK), *x.stride(), factor)


def _mean(x: Tensor, *, scale: Tensor | None = None) -> Tensor:
    """Means over tokens float32 [heads, width]; the scales of columns, of the same shape, are filled in where wanted."""
    form, sizes = token_form(x.shape[3], sums=True), _sizes(x)
    units = sizes.all_heads * sizes.blocks
    shape, dtype = (units, form.width), torch.float32
    low, high = (None if scale is None else x.new_empty(shape, dtype=dtype) for _ in range(2))
    mean = x.new_empty(sizes.all_heads, form.width, dtype=dtype)
    t = TokenTensors(x=x, partial=x.new_empty(shape, dtype=dtype), low=low, high=high, mean=mean, scale=scale)
    launch(sums_kernel, (triton.cdiv(units, form.tokens),), t, sizes, form, on=x, num_warps=4)
    launch(means_kernel, (sizes.all_heads,), t, sizes, form, on=x, num_warps=1)
    return mean


def _tokens(
    x: Tensor, form: TokenForm, *, padded: int, mean: Tensor | None, clip: Tensor | None, factor: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Codes int8 [heads, padded, width] and scales float32 [heads, padded]."""
    sizes = _sizes(x, padded=padded, factor=factor)
    codes = x.new_empty(sizes.all_heads, padded, form.width, dtype=torch.int8)
    scale = x.new_empty(sizes.all_heads, padded, dtype=torch.float32)
    t = TokenTensors(x=x, mean=mean, scale=scale, clip=None if clip is None else clip.contiguous(), codes=codes)
    grid = (sizes.all_heads * triton.cdiv(padded, form.tokens),)
    launch(tokens_kernel, grid, t, sizes, form, on=x, num_warps=4)
    return codes, scale


def _factors(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Factors of scores [heads, M]: scales of queries times c, as far as the heads' largest scales [heads, 1] allow."""
    is_finite = torch.isfinite(query) & (key < LARGEST_KEY) & torch.isfinite(value)  # amax keeps a NaN
    return torch.where(is_finite, torch.minimum(query, 1.0 / key), torch.nan)


def quantize(q: Tensor, k: Tensor, v: Tensor, *, tensors: AttentionTensors, spec: AttentionSpec) -> Codes:
    """Codes and scales of an attention.

    Args:
        q: Queries [B, H, M, D], rotated, of any strides; M > 0.
        k: Keys [B, H, N, D], rotated; N > 0.
        v: Values [B, H, N, D].
        tensors: Clips.
        spec: The attention.
    """
    form = token_form(spec.head_size)
    padded = triton.cdiv(k.shape[2], BLOCK) * BLOCK
    query, query_scale = _tokens(
        q, form, padded=q.shape[2], mean=None, clip=tensors.query_clip, factor=spec.score_factor
    )
    key_mean = _mean(k) if spec.smooth_key else None
    key, key_scale = _tokens(k, form, padded=padded, mean=key_mean, clip=tensors.key_clip)
    if spec.probability_type(v.dtype) is not None:
        largest = torch.linalg.vector_norm(v, ord=float("inf"), dim=(2, 3)).float().view(-1, 1)  # keeps a NaN
        value_scale = torch.where(largest < LARGEST_VALUE, 1.0, torch.inf)
        factor = _factors(query_scale, key_scale.amax(1, keepdim=True), value_scale)
        return Codes(query, factor, key, key_scale, None, None, None, None)
    sizes, new = _sizes(v), v.new_empty
    scale = new(sizes.all_heads, form.width, dtype=torch.float32)
    mean = _mean(v, scale=scale)
    value = new(sizes.all_heads, sizes.blocks, form.width, BLOCK, dtype=torch.int8)
    base = new(sizes.all_heads, sizes.blocks, form.width, dtype=torch.int32)
    t = TokenTensors(x=v, mean=mean, scale=scale, codes=value, base=base)
    warps = 4 if form.width <= 128 else 8
    launch(values_kernel, (sizes.all_heads * sizes.blocks,), t, sizes, form, on=v, num_warps=warps)
    factor = _factors(query_scale, key_scale.amax(1, keepdim=True), scale.amax(1, keepdim=True))
    return Codes(query, factor, key, key_scale, value, base, scale, mean)
