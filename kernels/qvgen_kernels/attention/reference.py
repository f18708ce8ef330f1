"""Exact reference of the quantized attention in plain torch (kernels/attention.md): the oracle of every backend.

Integers come from float32 products: 127 * 127 * D and 255 * 127 * 64 are below 2^24, so that no partial sum of any order
rounds. Products of probabilities with plain values are added one by one. Everything else is elementwise, or a sum whose order
is written out here as a loop. Torch has no fused multiply-add, so these are made of float64 numbers (:func:`fused`). Memory
grows with a block of keys and not with all of them. Nothing here is fast.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qvgen_kernels.attention.contract import (
    BLOCK,
    EXP2,
    EXP2_FINE,
    FINE_BITS,
    FLUSHED,
    LARGEST_KEY,
    LARGEST_VALUE,
    REACH,
    SLACK,
    SPAN,
    WHOLE,
    AttentionSpec,
    AttentionTensors,
)
from qvgen_kernels.hadamard import block_hadamard

__all__ = [
    "block_probabilities",
    "block_scores",
    "code_rows",
    "code_tokens",
    "fused",
    "plain_values",
    "quantize_keys",
    "quantize_queries",
    "quantize_values",
    "reach",
    "reference_attention",
    "rotated",
    "running_sums",
    "score_factors",
    "token_mean",
    "token_sum",
]

Coded = tuple[Tensor, Tensor]
"""Codes of queries or keys, and what their scores are multiplied by."""

_CHUNK_ELEMENTS = 1 << 22


def rotated(x: Tensor, *, spec: AttentionSpec) -> Tensor:
    """Queries or keys [B, H, T, D] as the spec rotates them, in float32; as they are where it does not."""
    if not spec.rotation:
        return x
    return block_hadamard(x.float().reshape(-1, spec.head_size), block=spec.rotation).reshape(x.shape)


def token_sum(x: Tensor) -> Tensor:
    """Sum over tokens, float32 [B, H, T, D] -> [B, H, 1, D]: sums of 64 one after another, then these likewise, from 0."""
    blocks = torch.nn.functional.pad(x, (0, 0, 0, -x.shape[2] % BLOCK)).unflatten(2, (-1, BLOCK))
    parts = blocks[:, :, :, 0].clone()
    for token in range(
        1, min(BLOCK, x.shape[2])
    ):  # to add the zeros of the last block changes no sum that began with 0
        parts += blocks[:, :, :, token]
    total = torch.zeros_like(x[:, :, :1])
    for part in parts.split(1, dim=2):
        total += part
    return total


def token_mean(x: Tensor) -> Tensor:
    """Mean over tokens, float32 [B, H, T, D] -> [B, H, 1, D]: their sum divided by T."""
    total = token_sum(x)
    return total / torch.full_like(total, x.shape[2])


def _symmetric(x: Tensor, largest: Tensor) -> tuple[Tensor, Tensor]:
    """Codes in -127..127 and scales for the largest magnitudes, which are of x's shape or broadcast to it."""
    scale = (largest / torch.full_like(largest, 127.0)).clamp_min(1e-8)
    return (x * (1.0 / scale)).round_().clamp_(-127, 127), scale


def code_rows(rows: Tensor, clip: Tensor | None) -> tuple[Tensor, Tensor]:
    """Codes [B, H, T, D] and scales [B, H, T, 1] of queries or keys float32 [B, H, T, D], whose clips are [H]."""
    largest = rows.abs().amax(-1, keepdim=True)
    return _symmetric(rows, largest if clip is None else largest * clip.view(1, -1, 1, 1))


def code_tokens(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Codes [B, H, N, D] and scales [B, H, 1, D] of values less their mean, float32 [B, H, N, D]."""
    return _symmetric(rows, rows.abs().amax(2, keepdim=True))


def quantize_queries(q: Tensor, *, tensors: AttentionTensors, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
    """Codes [B, H, M, D] and scales [B, H, M, 1] of queries."""
    return code_rows(rotated(q, spec=spec).float(), tensors.query_clip)


def quantize_keys(k: Tensor, *, tensors: AttentionTensors, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
    """Codes [B, H, N, D] and scales [B, H, N, 1] of keys, less their mean where the spec wants that."""
    rows = rotated(k, spec=spec).float()
    return code_rows(rows - token_mean(rows) if spec.smooth_key else rows, tensors.key_clip)


def plain_values(v: Tensor) -> tuple[Tensor, Tensor]:
    """Values as they are, float32 [B, H, N, D], and scales [B, H, 1, D]: 1, infinite where a column has one too large."""
    rows = v.float()
    largest = rows.abs().amax(2, keepdim=True)
    return rows, torch.where(largest < LARGEST_VALUE, 1.0, torch.inf)


def quantize_values(v: Tensor, *, spec: AttentionSpec) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [B, H, N, D], scales [B, H, 1, D] and means [B, H, 1, D] of values; of plain ones 1 and 0."""
    rows = v.float()
    if spec.probability_type(v.dtype) is not None:
        return *plain_values(v), torch.zeros_like(rows[:, :, :1])
    mean = token_mean(rows)
    return *code_tokens(rows - mean), mean


def score_factors(query: Tensor, key: Tensor, value: Tensor, *, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
    """Factors of a query's scores, and which queries are not finite.

    Args:
        query: Scales of queries, float32 [B, H, M, 1].
        key: Scales of keys [B, H, N, 1].
        value: Scales of values [B, H, 1, D].
        spec: The attention.

    Returns:
        Float32 [B, H, M, 1], at most one over the head's largest scale of a key; bool [B, H, M, 1].
    """
    factor = query * torch.full_like(query, spec.score_factor)
    is_lost = ~((key < LARGEST_KEY).all(2, keepdim=True) & torch.isfinite(value).all(3, keepdim=True))
    return torch.minimum(factor, 1.0 / key.amax(2, keepdim=True)), is_lost | ~torch.isfinite(factor)


def fused(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """The float32 tensors a b + c, rounded once.

    The product of two float32 numbers is exact in float64. Its sum with c is rounded to odd there: to the neighbour whose
    last bit is 1, unless it is exact. So it lies halfway between two float32 numbers only where the exact sum does, and the
    second rounding is as if there had been no first one (Boldo and Melquiond, Emulation of a FMA and correctly rounded sums:
    proved algorithms using rounding to odd, 2008).
    """
    product, addend = a.double() * b.double(), c.double()
    total = product + addend
    share = total - product
    rest = (product - (total - share)) + (addend - share)  # what rounding took off, exactly (Knuth)
    bits = total.view(torch.int64)
    is_even = (rest != 0) & (bits & 1 == 0)
    outwards = torch.where((rest > 0) == (total > 0), 1, -1)
    return torch.where(is_even, bits + outwards, bits).view(torch.float64).float()


def _quotient(g: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    """A polynomial of float64 numbers g of 20 bits, each step rounded once to float32: sums of products are exact before."""
    total = torch.full_like(g, coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        total = (total * g + coefficient).float().double()
    return total


def block_probabilities(z: Tensor, factor: Tensor, dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
    """Probabilities of a block, relative to its exponent, and that exponent.

    Args:
        z: Scores times their keys' scales, float32 [.., m, up to 64]; -inf where a key is hidden.
        factor: The factor of a query's scores, [.., m, 1].
        dtype: Type of the probabilities, whole numbers from 0 to about 2^15; None: codes 0..255.

    Returns:
        Float32 [.., m, up to 64] and [.., m, 1]; the exponent of a block without keys is -inf.
    """
    is_hidden = torch.isneginf(z)
    x = z.amax(-1, keepdim=True) * factor
    top = ((x + (x.abs() * SLACK + 0.5)) + WHOLE) - WHOLE
    top = top.masked_fill(is_hidden.all(-1, keepdim=True), -torch.inf)
    step = 0.5 / SPAN
    below = fused(z, (factor * -step).expand_as(z), (top * step + 0.5).expand_as(z)).clamp_max(1.0)  # 1/2 + d / 32
    largest = 8 if dtype is None else FINE_BITS
    bits = 0x2F800000 + (largest << 23) - (below.view(torch.int32) << 4)  # those of 2^n g, with n + g - 1 = largest - d
    power = bits.view(torch.float32).double()
    g = ((bits & 0x7FFFFF) | 0x3F800000).view(torch.float32).double()
    p = (power * _quotient(g, EXP2 if dtype is None else EXP2_FINE)).round_().float()
    p = p if dtype is None else p.to(dtype).float()
    return p.masked_fill_(is_hidden, 0.0), top


def _power_of_two(exponent: Tensor) -> Tensor:
    """2^exponent of whole numbers from -126 to 127, made of its bits: library functions may be off by one."""
    return ((exponent.to(torch.int32) + 127) << 23).view(torch.float32)


def reach(exponent: Tensor) -> Tensor:
    """2^exponent of whole numbers up to 0, but no less than 2^-64, which stands for -inf and NaN too."""
    return _power_of_two(torch.where(exponent > -REACH, exponent, -REACH))


def _add_block(total: Tensor, top: Tensor, *, part: Tensor, exponent: Tensor) -> tuple[Tensor, Tensor]:
    """The running sums [.., m, D + 1] and their exponent, with a block's integer sums added."""
    highest = torch.maximum(top, exponent)
    is_empty = torch.isneginf(exponent)
    kept = total * reach(top - highest)
    kept = torch.where(kept.abs() < FLUSHED, 0.0, kept)
    added = kept + part * reach(exponent - highest)
    return torch.where(is_empty, total, added), highest


def block_scores(q: Tensor, k: Coded, mask: Tensor | None, here: slice) -> Tensor:
    """Scores of queries' codes and one block of keys, times these keys' scales, float32 [B, H, m, 64]; hidden ones -inf."""
    codes, scale = k
    z = (q @ codes[:, :, here].mT) * scale[:, :, here].mT
    if mask is None:
        return z
    return z.masked_fill(~(mask if mask.shape[-1] == 1 else mask[..., here]), -torch.inf)


def _block_sums(p: Tensor, values: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Products of probabilities [B, H, m, n] and the columns of a block's values [B, H, n, D]: integers, or one by one."""
    if dtype is None:
        return p @ values
    total = torch.zeros(*p.shape[:3], values.shape[3], device=p.device)
    for key in range(p.shape[3]):
        total += p[..., key : key + 1] * values[:, :, key : key + 1]
    return total


def running_sums(
    q: Coded, k: Coded, value_codes: Tensor, mask: Tensor | None, dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    """Add up all blocks of keys for some queries.

    Args:
        q: Codes [B, H, m, D] and the factors of their scores [B, H, m, 1] (:func:`score_factors`).
        k: Codes [B, H, N, D] and scales [B, H, N, 1].
        value_codes: [B, H, N, D].
        mask: bool, [B, H, m, N] or 1 in place of any of these sizes; None: every key is seen.
        dtype: Type of probabilities; None: 8-bit codes.

    Returns:
        The sums A and, as the last column, L: float32 [B, H, m, D + 1]; and their exponent E [B, H, m, 1].
    """
    values = torch.cat([value_codes, torch.ones_like(value_codes[..., :1])], dim=-1)  # the last column sums the codes
    total = values.new_zeros(*q[0].shape[:3], values.shape[-1])
    top = torch.full_like(q[1], -torch.inf)
    for begin in range(0, values.shape[2], BLOCK):
        here = slice(begin, begin + BLOCK)
        probabilities, exponent = block_probabilities(block_scores(q[0], k, mask, here), q[1], dtype)
        part = _block_sums(probabilities, values[:, :, here], dtype)
        total, top = _add_block(total, top, part=part, exponent=exponent)
    return total, top


def _head_rows(
    q: Coded, k: Coded, v: tuple[Tensor, Tensor, Tensor], mask: Tensor | None, dtype: torch.dtype | None
) -> Tensor:
    """Outputs float32 [B, H, m, D] of some queries."""
    value_codes, value_scale, mean = v
    total, _ = running_sums(q, k, value_codes, mask, dtype)
    sums, weight = total[..., :-1], total[..., -1:]
    is_lonely = weight == 0
    out = sums * (1.0 / torch.where(is_lonely, 1.0, weight)) * value_scale + mean
    return out.masked_fill(is_lonely, 0.0)


def reference_attention(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None, tensors: AttentionTensors, spec: AttentionSpec
) -> Tensor:
    """Attention as kernels/attention.md defines it.

    Args:
        q: Queries [B, H, M, D].
        k: Keys [B, H, N, D].
        v: Values [B, H, N, D].
        mask: bool, [B, H, M, N] or 1 in place of any of these sizes: True where a query sees a key; None: everywhere.
        tensors: Clips.
        spec: The attention.

    Returns:
        [B, H, M, D] of q's dtype.
    """
    if not q.numel() or not k.numel():
        return torch.zeros_like(q, memory_format=torch.contiguous_format)
    keys, values = quantize_keys(k, tensors=tensors, spec=spec), quantize_values(v, spec=spec)
    codes, scale = quantize_queries(q, tensors=tensors, spec=spec)
    factor, is_bad = score_factors(scale, keys[1], values[1], spec=spec)
    count = max(1, _CHUNK_ELEMENTS // (q.shape[0] * q.shape[1] * (BLOCK + q.shape[3])))
    out, dtype = torch.empty(q.shape, dtype=torch.float32, device=q.device), spec.probability_type(v.dtype)
    for begin in range(0, q.shape[2], count):
        rows = slice(begin, begin + count)
        seen = mask if mask is None or mask.shape[2] == 1 else mask[:, :, rows]
        out[:, :, rows] = _head_rows((codes[:, :, rows], factor[:, :, rows]), keys, values, seen, dtype)
    return out.masked_fill_(is_bad, torch.nan).to(q.dtype)
