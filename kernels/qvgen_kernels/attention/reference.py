"""Exact reference of the quantized attention in plain torch (kernels/attention.md): the oracle of every backend.

Integers come from float32 products: 127 * 127 * D and 255 * 127 * 64 are below 2^24, so that no partial sum of any order
rounds. Everything else is elementwise, or a sum whose order is written out here as a loop. Memory grows with a block of keys
and not with all of them. Nothing here is fast.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qvgen_kernels.attention.contract import BLOCK, EXP2, FLUSHED, LOWEST, REACH, AttentionSpec, AttentionTensors
from qvgen_kernels.hadamard import block_hadamard

__all__ = [
    "block_exponents",
    "block_probabilities",
    "code_rows",
    "code_tokens",
    "quantize_keys",
    "quantize_queries",
    "quantize_values",
    "reach",
    "reference_attention",
    "rotated",
    "running_sums",
    "score_scale",
    "token_mean",
    "token_sum",
]

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


def score_scale(scale: Tensor, spec: AttentionSpec) -> Tensor:
    """Scales of queries times the factor of scores."""
    return scale * torch.full_like(scale, spec.score_factor)


def quantize_queries(q: Tensor, *, tensors: AttentionTensors, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
    """Codes [B, H, M, D] and scales [B, H, M, 1] of queries, already times the factor of scores."""
    codes, scale = code_rows(rotated(q, spec=spec).float(), tensors.query_clip)
    return codes, score_scale(scale, spec)


def quantize_keys(k: Tensor, *, tensors: AttentionTensors, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
    """Codes [B, H, N, D] and scales [B, H, N, 1] of keys, less their mean where the spec wants that."""
    rows = rotated(k, spec=spec).float()
    return code_rows(rows - token_mean(rows) if spec.smooth_key else rows, tensors.key_clip)


def quantize_values(v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [B, H, N, D], scales [B, H, 1, D] and means [B, H, 1, D] of values."""
    rows = v.float()
    mean = token_mean(rows)
    return *code_tokens(rows - mean), mean


def block_probabilities(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes 0..255 and the exponent of a block of exponents x [.., m, 64], whose masked keys are -inf."""
    top = x.amax(-1, keepdim=True).ceil()
    t = (x - top).clamp_min(LOWEST)  # -inf less -inf is NaN in a block without keys, whose codes are dropped
    whole = (t + 12582912.0) - 12582912.0
    f = t - whole
    c0, c1, c2, c3 = (torch.full_like(f, value) for value in EXP2)
    value = (((f * c3 + c2) * f + c1) * f + c0) * _power_of_two(whole.nan_to_num(0.0))
    return value.round_().masked_fill_(torch.isneginf(x), 0), top


def _power_of_two(exponent: Tensor) -> Tensor:
    """2^exponent of whole numbers from -126 to 127, made of its bits: library functions may be off by one."""
    return ((exponent.to(torch.int32) + 127) << 23).view(torch.float32)


def reach(exponent: Tensor) -> Tensor:
    """2^exponent of whole numbers from -64 to 0; 0 below."""
    inside = exponent >= -REACH
    return torch.where(inside, _power_of_two(torch.where(inside, exponent, 0.0)), 0.0)


def _add_block(total: Tensor, top: Tensor, *, part: Tensor, exponent: Tensor) -> tuple[Tensor, Tensor]:
    """The running sums [.., m, D + 1] and their exponent, with a block's integer sums added."""
    highest = torch.maximum(top, exponent)
    is_empty = torch.isneginf(exponent)
    is_first = torch.isneginf(top)
    shrink = torch.where(is_first, 0.0, reach(torch.where(is_first, 0.0, top - highest)))
    kept = total * shrink
    kept = torch.where(kept.abs() < FLUSHED, 0.0, kept)
    added = kept + part * reach(torch.where(is_empty, 0.0, exponent - highest))
    return torch.where(is_empty, total, added), torch.where(is_empty, top, highest)


def block_exponents(q: tuple[Tensor, Tensor], k: tuple[Tensor, Tensor], mask: Tensor | None, here: slice) -> Tensor:
    """Exponents of two x float32 [B, H, m, 64] of queries and one block of keys, each codes and scales; hidden ones -inf."""
    (codes, scale), (key_codes, key_scale) = q, k
    x = (codes @ key_codes[:, :, here].mT) * key_scale[:, :, here].mT * scale
    if mask is None:
        return x
    return x.masked_fill(~(mask if mask.shape[-1] == 1 else mask[..., here]), -torch.inf)


def running_sums(
    q: tuple[Tensor, Tensor], k: tuple[Tensor, Tensor], value_codes: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Add up all blocks of keys for some queries.

    Args:
        q: Codes [B, H, m, D] and scales [B, H, m, 1] of :func:`quantize_queries`.
        k: Codes [B, H, N, D] and scales [B, H, N, 1].
        value_codes: [B, H, N, D].
        mask: bool, [B, H, m, N] or 1 in place of any of these sizes; None: every key is seen.

    Returns:
        The sums A and, as the last column, L: float32 [B, H, m, D + 1]; their exponent E [B, H, m, 1]; and whether an
        exponent was not finite, bool [B, H, m, 1].
    """
    values = torch.cat([value_codes, torch.ones_like(value_codes[..., :1])], dim=-1)  # the last column sums the codes
    total = values.new_zeros(*q[0].shape[:3], values.shape[-1])
    top = torch.full_like(q[1], -torch.inf)
    is_bad = torch.zeros_like(top, dtype=torch.bool)
    for begin in range(0, values.shape[2], BLOCK):
        here = slice(begin, begin + BLOCK)
        probabilities, exponent = block_probabilities(block_exponents(q, k, mask, here))
        is_bad |= torch.isposinf(exponent)
        total, top = _add_block(total, top, part=probabilities @ values[:, :, here], exponent=exponent)
    return total, top, is_bad


def _head_rows(
    q: tuple[Tensor, Tensor], k: tuple[Tensor, Tensor], v: tuple[Tensor, Tensor, Tensor], mask: Tensor | None
) -> Tensor:
    """Outputs float32 [B, H, m, D] of some queries."""
    value_codes, value_scale, mean = v
    total, _, is_bad = running_sums(q, k, value_codes, mask)
    sums, weight = total[..., :-1], total[..., -1:]
    is_lonely = weight == 0
    out = sums * (1.0 / torch.where(is_lonely, 1.0, weight)) * value_scale + mean
    return out.masked_fill(is_lonely, 0.0).masked_fill(is_bad, torch.nan)


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
    keys, values = quantize_keys(k, tensors=tensors, spec=spec), quantize_values(v)
    codes, scale = quantize_queries(q, tensors=tensors, spec=spec)
    head = torch.isfinite(keys[1]).all(2, keepdim=True) & torch.isfinite(values[1]).all(3, keepdim=True)
    is_finite = torch.isfinite(scale) & head
    count = max(1, _CHUNK_ELEMENTS // (q.shape[0] * q.shape[1] * (BLOCK + q.shape[3])))
    out = torch.empty(q.shape, dtype=torch.float32, device=q.device)
    for begin in range(0, q.shape[2], count):
        rows = slice(begin, begin + count)
        seen = mask if mask is None or mask.shape[2] == 1 else mask[:, :, rows]
        out[:, :, rows] = _head_rows((codes[:, :, rows], scale[:, :, rows]), keys, values, seen)
    return out.masked_fill_(~is_finite, torch.nan).to(q.dtype)
