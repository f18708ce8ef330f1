"""Gradient of the quantized attention (kernels/attention.md, "Gradient"): the chain around its products, and these in torch.

    W_ij = P_ij (dP_ij - sum over j of P_ij dP_ij),   dP_ij = g_i . v^_j
    dq^_i = lambda sum over j of W_ij k^_j,   dk^_j = lambda sum over i of W_ij q^_i,   dv^_j = sum over i of P_ij g_i

P are the forward's own codes, computed again: the backward pass keeps the inputs alone. A backend may bring its own
products (:data:`Products`); what comes before and after them are passes over queries, keys and values, and torch's here.

The sums over P and its gradient have no 8-bit factor but P: dP and W stay in float32, because most of the error of trained
low-bit attention comes from there (SageBwd, arXiv 2603.02170). The forward's codes stand in P, and in the sum that is
subtracted, for a backward pass that takes other numbers than the forward diverges (Attn-QAT, arXiv 2603.00040).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from qvgen_kernels.attention.contract import BLOCK, AttentionSpec, AttentionTensors
from qvgen_kernels.attention.reference import (
    block_probabilities,
    block_scores,
    code_rows,
    code_tokens,
    plain_values,
    reach,
    rotated,
    running_sums,
    score_factors,
    token_mean,
    token_sum,
)

__all__ = ["Operands", "Products", "Side", "attention_gradients", "reference_products"]

QUERIES = 512
"""Queries of a block of the products: what it adds to the gradients of keys and values is one sum."""


class Side(NamedTuple):
    """Queries, keys or values as they are quantized, float32.

    Attributes:
        rows: [B, H, T, D], rotated and less their mean where they are.
        codes: [B, H, T, D], whole numbers from -127 to 127.
        scale: [B, H, T, 1] of queries and keys, [B, H, 1, D] of values.

    Values that are not quantized are rows and codes alike, and have the scale 1.
    """

    rows: Tensor
    codes: Tensor
    scale: Tensor

    @property
    def dequantized(self) -> Tensor:
        """Codes times scales, float32 [B, H, T, D]."""
        return self.codes * self.scale


class Operands(NamedTuple):
    """The three sides of a call."""

    query: Side
    key: Side
    value: Side


Products = Callable[[Tensor, Operands], tuple[Tensor, Tensor, Tensor]]
"""From g float32 [B, H, M, D] and the operands: dq^ / lambda, dk^ / lambda and dv^, float32."""


def _operands(inputs: tuple[Tensor, Tensor, Tensor], *, tensors: AttentionTensors, spec: AttentionSpec) -> Operands:
    q, k, v = (x.contiguous() for x in inputs)  # so that strides change no order of sums
    query, key, value = rotated(q, spec=spec).float(), rotated(k, spec=spec).float(), v.float()
    key = key - token_mean(key) if spec.smooth_key else key
    is_plain = spec.probability_type(v.dtype) is not None
    value = value if is_plain else value - token_mean(value)
    return Operands(
        Side(query, *code_rows(query, tensors.query_clip)),
        Side(key, *code_rows(key, tensors.key_clip)),
        Side(value, *(plain_values(v) if is_plain else code_tokens(value))),
    )


def reference_products(
    grad: Tensor, operands: Operands, *, mask: Tensor | None, spec: AttentionSpec, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """The :data:`Products` in torch, 512 queries and 64 keys at a time.

    Args:
        grad: Gradient of the outputs, float32 [B, H, M, D].
        operands: Quantized queries, keys and values.
        mask: bool, [B, H, M, N] or 1 in place of any of these sizes; None: every key is seen.
        spec: The attention.
        dtype: Type of v.

    Returns:
        dq^ / lambda, dk^ / lambda and dv^.
    """
    kind = spec.probability_type(dtype)
    query, key, value = operands
    factor, _ = score_factors(query.scale, key.scale, value.scale, spec=spec)
    keys = (key.codes, key.scale)
    query_rows, key_rows, value_rows = (side.dequantized for side in operands)
    of_query, of_key, of_value = (torch.zeros_like(side.codes) for side in operands)
    for begin in range(0, grad.shape[2], QUERIES):
        rows = slice(begin, begin + QUERIES)
        seen = mask if mask is None or mask.shape[2] == 1 else mask[:, :, rows]
        coded, g = (query.codes[:, :, rows], factor[:, :, rows]), grad[:, :, rows]
        total, top = running_sums(coded, keys, value.codes, seen, kind)
        weight = total[..., -1:]
        inverse = 1.0 / torch.where(weight == 0, 1.0, weight)
        expected = (g * (total[..., :-1] * inverse * value.scale)).sum(-1, keepdim=True)
        for first in range(0, key.codes.shape[2], BLOCK):
            here = slice(first, first + BLOCK)
            codes, exponent = block_probabilities(block_scores(coded[0], keys, seen, here), coded[1], kind)
            p = codes * (reach(exponent - top) * inverse)
            of_value[:, :, here] += p.mT @ g
            w = p * (g @ value_rows[:, :, here].mT - expected)
            of_query[:, :, rows] += w @ key_rows[:, :, here]
            of_key[:, :, here] += w.mT @ query_rows[:, :, rows]
    return of_query, of_key, of_value


def _through_codes(grad: Tensor, side: Side, *, clip: Tensor | None, axis: int) -> tuple[Tensor, Tensor, Tensor]:
    """Straight through the rounding of a side, as qvgen.quant.ste has it for a range from the row itself.

    Args:
        grad: Gradient of the dequantized side, float32 [B, H, T, D].
        side: What was quantized.
        clip: Factors of the largest magnitude, float32 [H]; None for 1.
        axis: Elements that share a scale: -1 those of a token, 2 those of a column.

    Returns:
        Float32 [B, H, T, D] twice: the gradient where no element was cut, and what the largest elements have besides,
        because the scale is theirs; and the gradient of the clip by rows.
    """
    total = token_sum if axis == 2 else lambda x: x.sum(-1, keepdim=True)
    kept = torch.where((side.rows * (1.0 / side.scale)).abs() < 127.5, grad, 0.0)
    of_scale = total(grad * side.codes) - total(kept * side.rows) / side.scale
    of_largest = torch.where(side.scale > 1e-8, of_scale / 127.0, 0.0)  # at its floor a scale depends on nothing
    magnitude = side.rows.abs()
    largest = magnitude.amax(axis, keepdim=True)
    is_largest = magnitude == largest
    share = of_largest / is_largest.sum(axis, keepdim=True)
    if clip is not None:
        share = share * clip.view(1, -1, 1, 1)
    return kept, torch.where(is_largest, share * side.rows.sign(), 0.0), of_largest * largest


def _clip_gradient(by_row: Tensor) -> Tensor:
    """Sums [B, H, T, 1] -> [H]: over tokens as :func:`token_sum`, then sample after sample."""
    by_sample = token_sum(by_row).flatten(1)
    total = torch.zeros_like(by_sample[0])
    for part in by_sample:
        total += part
    return total


def _less_mean(grad: Tensor) -> Tensor:
    return grad - token_sum(grad) / grad.shape[2]


def attention_gradients(
    grad: Tensor,
    inputs: tuple[Tensor, Tensor, Tensor],
    *,
    tensors: AttentionTensors,
    spec: AttentionSpec,
    products: Products,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the attention of kernels/attention.md.

    Args:
        grad: Gradient of the outputs [B, H, M, D].
        inputs: q [B, H, M, D], k and v [B, H, N, D] of the forward pass.
        tensors: Its clips.
        spec: The attention.
        products: What computes the sums over queries and keys; it knows the mask.

    Returns:
        Gradients of q, k and v in their type, computed in float32 and cast once, and of both clips, float32 [H]; where there
        is no clip, at 1.
    """
    operands = _operands(inputs, tensors=tensors, spec=spec)
    of_query, of_key, of_value = products(grad.float().contiguous(), operands)
    _, is_bad = score_factors(*(side.scale for side in operands), spec=spec)
    is_lost = is_bad.any(2, keepdim=True)

    slope = spec.score_factor * math.log(2.0)
    query, query_share, query_clip = _through_codes(of_query * slope, operands.query, clip=tensors.query_clip, axis=-1)
    key, key_share, key_clip = _through_codes(of_key * slope, operands.key, clip=tensors.key_clip, axis=-1)
    value = of_value
    if spec.probability_type(inputs[2].dtype) is None:
        value, share, _ = _through_codes(of_value, operands.value, clip=None, axis=2)
        value += _less_mean(share)  # the mean comes back with the outputs, so what is common to all tokens stays
    query += query_share
    key += key_share
    key = _less_mean(key) if spec.smooth_key else key

    rows = [
        rotated(query, spec=spec).masked_fill(is_bad, torch.nan),
        rotated(key, spec=spec).masked_fill(is_lost, torch.nan),
        value.masked_fill(is_lost, torch.nan),
    ]
    of_q, of_k, of_v = (row.to(x.dtype) for row, x in zip(rows, inputs, strict=True))
    query_clip, key_clip = (_clip_gradient(part.masked_fill(is_lost, torch.nan)) for part in (query_clip, key_clip))
    return of_q, of_k, of_v, query_clip, key_clip
