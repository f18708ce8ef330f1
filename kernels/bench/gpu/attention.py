"""Attention in 8 bits on the card: outputs held to the exact reference.

    real         4 276 and 17 776 tokens: some queries, to all keys, with the reference on the card
    random       sizes of heads, masks, clips, rotation, types, rows that are not finite; the reference runs on the CPU

Every call is made twice: a result that moves is a race.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from gpu.setting import Case, Row, Setting
from qvgen_kernels.attention import AttentionSpec, AttentionTensors, attention
from qvgen_kernels.attention.triton.backend import triton_attention

__all__ = ["HEAD_SIZES", "TOKENS", "cases", "make_numbers", "operator"]

TOKENS = (4276, 17776)
HEAD_SIZES = (64, 128)
_SIZES = (64, 72, 96, 128, 4, 36, 256)
_EXTREMES = (float("nan"), float("inf"), 3e38, 1e30, 1e-30, 0.0)


def cases(setting: Setting, *, warm: bool = False) -> Iterator[Case]:
    """All cases; in a rehearsal a few tiny ones."""
    if not setting.rehearse and not warm:
        for tokens in TOKENS:
            for size in HEAD_SIZES:
                yield f"real {tokens} x {size}", partial(_real, setting, tokens, size)
    for seed in range(2 if setting.rehearse else 70):
        yield f"random {seed}", partial(_random, setting, seed)


def operator(setting: Setting) -> Callable[..., Tensor]:
    """The operator; in a rehearsal the kernels themselves, which no operator takes to the interpreter."""
    return triton_attention if setting.rehearse else partial(attention, kernel="triton")


def _same_bytes(first: Tensor, second: Tensor) -> bool:
    return torch.equal(first.contiguous().view(torch.uint8), second.contiguous().view(torch.uint8))


def _random(setting: Setting, seed: int) -> Iterator[Row]:
    """A drawn call against the reference on the CPU."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    most, most_heads = (20, 1) if setting.rehearse else (700, 3)
    size = _SIZES[seed % len(_SIZES)]
    batch, heads, queries, keys = draw(1, 2), draw(1, most_heads), draw(1, most), draw(1, most)
    shape = (batch, heads, queries, keys)
    spread = (0.2, 1.0, 6.0)[draw(0, 2)]
    q = torch.randn(batch, heads, queries, size, generator=generator) * spread
    k, v = (torch.randn(batch, heads, keys, size, generator=generator) for _ in range(2))
    k += 2 * torch.randn(batch, heads, 1, size, generator=generator)
    if seed % 4 == 3:
        damaged = (q, k, v)[draw(0, 2)]
        damaged[0, 0, draw(0, damaged.shape[2] - 1), draw(0, size - 1)] = _EXTREMES[draw(0, len(_EXTREMES) - 1)]
    dtype = (torch.float32, torch.bfloat16, torch.float16)[draw(0, 2)]
    q, k, v = (tensor.to(dtype) for tensor in (q, k, v))
    mask = None
    if draw(0, 2):
        mask = torch.rand([full if draw(0, 1) else 1 for full in shape], generator=generator) > 0.4
    clips = AttentionTensors(*(torch.rand(heads, generator=generator) + 0.3 if draw(0, 1) else None for _ in range(2)))
    spec = AttentionSpec(size, smooth_key=bool(draw(0, 3)), rotation=size * draw(0, 1))
    expected = attention(q, k, v, spec=spec, mask=mask, tensors=clips, kernel="reference")

    def moved(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(setting.device)

    given = {"spec": spec, "mask": moved(mask), "tensors": AttentionTensors(*map(moved, clips))}
    found = [operator(setting)(*map(moved, (q, k, v)), **given).cpu() for _ in range(2)]
    same = (found[0] == expected) | (found[0].isnan() & expected.isnan())
    yield {
        "kernel": "triton", "equal": bool(same.all()), "steady": _same_bytes(*found), "differ": int((~same).sum()),
        "of": same.numel(), "shape": [*shape, size],
    }  # fmt: skip


def make_numbers(setting: Setting, heads: int, tokens: int, size: int) -> list[Tensor]:
    """Queries, keys and values [1, heads, tokens, size] in bfloat16."""
    generator = torch.Generator(setting.device).manual_seed(0)
    new = partial(torch.randn, 1, heads, tokens, size, device=setting.device, generator=generator)
    return [new().bfloat16() for _ in range(3)]


def _real(setting: Setting, tokens: int, size: int) -> Iterator[Row]:
    q, k, v = make_numbers(setting, 2, tokens, size)
    spec = AttentionSpec(size)
    some = torch.cat([torch.arange(0, 70), torch.arange(tokens - 70, tokens)]).to(setting.device)
    expected = attention(q[:, :, some], k, v, spec=spec, kernel="reference")
    first, second = (attention(q, k, v, spec=spec, kernel="triton") for _ in range(2))
    off = int((first[:, :, some] != expected).sum())
    steady = _same_bytes(first, second)
    yield {"kernel": "triton", "equal": off == 0, "steady": steady, "differ": off, "of": expected.numel()}
