"""Attention in 8 bits on the card: outputs held to the exact reference, and times beside torch's attention and SageAttention.

    random       sizes of heads, masks, clips, rotation, types, rows that are not finite; the reference runs on the CPU
    real         4 276 and 17 776 tokens: some queries, to all keys, with the reference on the card
    time         those tokens, heads of 64 and 128 (width 1 920): torch's attention in bfloat16 by each of its backends,
                 SageAttention where it is installed, and the attention in 8 bits whole and by part

Every call is made twice: a result that moves is a race.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from gpu.clock import by_events, by_wall, compare
from gpu.setting import Case, Row, Setting
from qvgen_kernels.attention import AttentionSpec, AttentionTensors, attention
from qvgen_kernels.attention.triton.backend import triton_attention

WIDTH = 1920
TOKENS = (4276, 17776)
HEAD_SIZES = (64, 128)
BASE = "torch bf16, flash"
SIZES = (64, 72, 96, 128, 4, 36, 256)
EXTREMES = (float("nan"), float("inf"), 3e38, 1e30, 1e-30, 0.0)


def cases(setting: Setting, *, warm: bool = False) -> Iterator[Case]:
    """All cases; in a rehearsal a few tiny ones."""
    few = setting.rehearse
    for seed in range(2 if few else 84):
        yield f"random {seed}", partial(_random, setting, seed)
    for tokens in (20,) if few else TOKENS:
        for size in HEAD_SIZES[:1] if few else HEAD_SIZES:
            if not few:
                yield f"real {tokens} x {size}", partial(_real, setting, tokens, size)
            yield f"time {tokens} x {size}", partial(_times, setting, tokens, size, warm)


def _call(setting: Setting) -> Callable[..., Tensor]:
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
    size = SIZES[seed % len(SIZES)]
    batch, heads, queries, keys = draw(1, 2), draw(1, most_heads), draw(1, most), draw(1, most)
    shape = (batch, heads, queries, keys)
    spread = (0.2, 1.0, 6.0)[draw(0, 2)]
    q = torch.randn(batch, heads, queries, size, generator=generator) * spread
    k, v = (torch.randn(batch, heads, keys, size, generator=generator) for _ in range(2))
    k += 2 * torch.randn(batch, heads, 1, size, generator=generator)
    if seed % 4 == 3:
        damaged = (q, k, v)[draw(0, 2)]
        damaged[0, 0, draw(0, damaged.shape[2] - 1), draw(0, size - 1)] = EXTREMES[draw(0, len(EXTREMES) - 1)]
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
    found = [_call(setting)(*map(moved, (q, k, v)), **given).cpu() for _ in range(2)]
    same = (found[0] == expected) | (found[0].isnan() & expected.isnan())
    yield {
        "kernel": "triton", "equal": bool(same.all()), "steady": _same_bytes(*found), "differ": int((~same).sum()),
        "of": same.numel(), "shape": [*shape, size],
    }  # fmt: skip


def _numbers(setting: Setting, heads: int, tokens: int, size: int) -> list[Tensor]:
    generator = torch.Generator(setting.device).manual_seed(0)
    new = partial(torch.randn, 1, heads, tokens, size, device=setting.device, generator=generator)
    return [new().bfloat16() for _ in range(3)]


def _real(setting: Setting, tokens: int, size: int) -> Iterator[Row]:
    q, k, v = _numbers(setting, 2, tokens, size)
    spec = AttentionSpec(size)
    some = torch.cat([torch.arange(0, 70), torch.arange(tokens - 70, tokens)]).to(setting.device)
    expected = attention(q[:, :, some], k, v, spec=spec, kernel="reference")
    first, second = (attention(q, k, v, spec=spec, kernel="triton") for _ in range(2))
    off = int((first[:, :, some] != expected).sum())
    steady = _same_bytes(first, second)
    yield {"kernel": "triton", "equal": off == 0, "steady": steady, "differ": off, "of": expected.numel()}


def _by_backend(name: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(name):
        return scaled_dot_product_attention(q, k, v)


def _times(setting: Setting, tokens: int, size: int, warm: bool) -> Iterator[Row]:
    from qvgen_kernels.attention.triton.attend import attend
    from qvgen_kernels.attention.triton.quantize import quantize

    heads = 1 if setting.rehearse else WIDTH // size
    q, k, v = _numbers(setting, heads, tokens, size)
    spec, none = AttentionSpec(size), AttentionTensors()
    ready, y = quantize(q, k, v, tensors=none, spec=spec), torch.empty_like(q)
    calls: dict[str, Callable[[], object]] = {BASE: partial(_by_backend, SDPBackend.FLASH_ATTENTION, q, k, v)}
    if not setting.rehearse:
        calls["torch bf16, cuDNN"] = partial(_by_backend, SDPBackend.CUDNN_ATTENTION, q, k, v)
    if importlib.util.find_spec("sageattention") is not None:
        calls["SageAttention"] = partial(_sage, q, k, v)
    calls["triton int8"] = partial(_call(setting), q, k, v, spec=spec, mask=None, tensors=none)
    calls["quantize alone"] = partial(quantize, q, k, v, tensors=none, spec=spec)
    calls["attend alone"] = partial(attend, ready, y=y, mask=None, keys=tokens, spec=spec)
    timer = by_wall if setting.rehearse else by_events
    found = compare(calls, timer=timer, rounds=1 if warm or setting.rehearse else None)
    for name, times in found.items():
        row: Row = {"tokens": tokens, "heads": heads, "head_size": size, "candidate": name, **times}
        if "ms" in times and name != "quantize alone":
            row["tops"] = 4.0 * tokens * tokens * size * heads / times["ms"] / 1e9
        yield row


def _sage(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from sageattention import sageattn

    out: Tensor = sageattn(q, k, v, tensor_layout="HND", is_causal=False)
    return out
