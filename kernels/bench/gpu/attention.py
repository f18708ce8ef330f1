"""Attention in 8 bits on the card: outputs held to the exact reference.

    real         4 276 and 17 776 tokens: some queries, to all keys, with the reference on the card
    random       sizes of heads, masks, clips, rotation, types, rows that are not finite; the reference runs on the CPU
    scores       the same with the scores alone in 8 bits, within the bound of kernels/attention.md: only their order of
                 sums is another one

Every call is made twice: a result that moves is a race.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from gpu.setting import Case, Row, Setting
from qvgen_kernels.attention import AttentionSpec, AttentionTensors, attention
from qvgen_kernels.attention.triton.backend import triton_attention

__all__ = ["HEAD_SIZES", "TOKENS", "cases", "draw_call", "make_numbers", "operator", "same_bytes"]

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
        if seed % 2:
            yield f"scores {seed}", partial(_scores, setting, seed)


def operator(setting: Setting) -> Callable[..., Tensor]:
    """The operator; in a rehearsal the kernels themselves, which no operator takes to the interpreter."""
    return triton_attention if setting.rehearse else partial(attention, kernel="triton")


def same_bytes(first: Tensor, second: Tensor) -> bool:
    """Whether two results are the same to the bit, NaNs included."""
    return torch.equal(first.contiguous().view(torch.uint8), second.contiguous().view(torch.uint8))


class Call(NamedTuple):
    """A call of the operator, on the CPU."""

    inputs: tuple[Tensor, Tensor, Tensor]
    spec: AttentionSpec
    mask: Tensor | None
    clips: AttentionTensors

    def on(self, device: str | torch.device) -> Call:
        """The same call on a device."""

        def moved(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device)

        q, k, v = (tensor.to(device) for tensor in self.inputs)
        return Call((q, k, v), self.spec, moved(self.mask), AttentionTensors(*map(moved, self.clips)))

    def run(self, operator: Callable[..., Tensor]) -> Tensor:
        """Its outputs, on the CPU."""
        return operator(*self.inputs, spec=self.spec, mask=self.mask, tensors=self.clips).cpu()


def draw_call(setting: Setting, seed: int, *, kind: str = "int8", damage: bool = True, least: int = 1) -> Call:
    """A drawn call of ``least`` keys or more; with ``damage`` an element of some is not finite."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    most, most_heads = (20, 1) if setting.rehearse else (700, 3)
    size = _SIZES[seed % len(_SIZES)]
    batch, heads, queries, keys = draw(1, 2), draw(1, most_heads), draw(1, most), draw(least, most)
    shape = (batch, heads, queries, keys)
    spread = (0.2, 1.0, 6.0)[draw(0, 2)]
    q = torch.randn(batch, heads, queries, size, generator=generator) * spread
    k, v = (torch.randn(batch, heads, keys, size, generator=generator) for _ in range(2))
    k += 2 * torch.randn(batch, heads, 1, size, generator=generator)
    if damage and seed % 4 == 3:
        damaged = (q, k, v)[draw(0, 2)]
        damaged[0, 0, draw(0, damaged.shape[2] - 1), draw(0, size - 1)] = _EXTREMES[draw(0, len(_EXTREMES) - 1)]
    dtype = (torch.float32, torch.bfloat16, torch.float16)[draw(0, 2)]
    q, k, v = (tensor.to(dtype) for tensor in (q, k, v))
    mask = None
    if draw(0, 2):
        mask = torch.rand([full if draw(0, 1) else 1 for full in shape], generator=generator) > 0.4
    clips = AttentionTensors(*(torch.rand(heads, generator=generator) + 0.3 if draw(0, 1) else None for _ in range(2)))
    spec = AttentionSpec(size, smooth_key=bool(draw(0, 3)), rotation=size * draw(0, 1), kind=kind)
    return Call((q, k, v), spec, mask, clips)


def _random(setting: Setting, seed: int) -> Iterator[Row]:
    """A drawn call against the reference on the CPU, to the bit."""
    call = draw_call(setting, seed)
    expected = call.run(partial(attention, kernel="reference"))
    found = [call.on(setting.device).run(operator(setting)) for _ in range(2)]
    yield _row(call, found, (found[0] == expected) | (found[0].isnan() & expected.isnan()))


def _scores(setting: Setting, seed: int) -> Iterator[Row]:
    """A drawn call with the scores alone in 8 bits, within the bound for another order of sums."""
    call = draw_call(setting, seed, kind="int8_qk", damage=False)
    q, k, v = call.inputs
    expected, magnitude = (
        call._replace(inputs=(q, k, value)).run(partial(attention, kernel="reference")).double()
        for value in (v, v.abs())
    )
    found = [call.on(setting.device).run(operator(setting)) for _ in range(2)]
    blocks = -(-k.shape[2] // 64)
    bound = (64 + blocks) * 2.0**-22 * magnitude + torch.finfo(q.dtype).eps * expected.abs()
    yield _row(call, found, (found[0].double() - expected).abs() <= bound)


def _row(call: Call, found: list[Tensor], right: Tensor) -> Row:
    batch, heads, queries, size = call.inputs[0].shape
    return {
        "kernel": "triton", "kind": call.spec.kind, "equal": bool(right.all()), "steady": same_bytes(*found),
        "differ": int((~right).sum()), "of": right.numel(), "shape": [batch, heads, queries, call.inputs[1].shape[2], size],
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
    steady = same_bytes(first, second)
    yield {"kernel": "triton", "equal": off == 0, "steady": steady, "differ": off, "of": expected.numel()}
