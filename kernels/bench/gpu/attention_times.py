"""Times of attention in 8 bits, whole and by part, beside torch's in bfloat16 by each of its backends, and SageAttention.

Self-attention of 4 276 and 17 776 tokens (CogVideoX-2b: 9 and 49 frames), heads of 64 and 128, 1 920 channels in all.
SageAttention is there where it is installed (pip install sageattention).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from gpu.attention import HEAD_SIZES, TOKENS, make_numbers, operator
from gpu.clock import by_events, by_wall, compare
from gpu.setting import Case, Row, Setting
from qvgen_kernels.attention import AttentionSpec, AttentionTensors

__all__ = ["FLASH", "cases"]

FLASH = "torch bf16, flash"
_WIDTH = 1920


def cases(setting: Setting, *, warm: bool = False) -> Iterator[Case]:
    """One case for each number of tokens and size of heads; in a rehearsal a tiny one."""
    for tokens in (20,) if setting.rehearse else TOKENS:
        for size in HEAD_SIZES[:1] if setting.rehearse else HEAD_SIZES:
            yield f"{tokens} tokens x {size}", partial(_times, setting, tokens, size, warm)


def _by_backend(name: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(name):
        return scaled_dot_product_attention(q, k, v)


def _times(setting: Setting, tokens: int, size: int, warm: bool) -> Iterator[Row]:
    from qvgen_kernels.attention.triton.attend import attend, attend_arguments
    from qvgen_kernels.attention.triton.quantize import quantize

    heads = 1 if setting.rehearse else _WIDTH // size
    q, k, v = make_numbers(setting, heads, tokens, size)
    spec, none = AttentionSpec(size), AttentionTensors()
    codes = quantize(q, k, v, tensors=none, spec=spec)
    given, sizes, form = attend_arguments(codes, v, queries=tokens, mask=None, spec=spec)
    calls: dict[str, Callable[[], object]] = {FLASH: partial(_by_backend, SDPBackend.FLASH_ATTENTION, q, k, v)}
    if not setting.rehearse:
        calls["torch bf16, cuDNN"] = partial(_by_backend, SDPBackend.CUDNN_ATTENTION, q, k, v)
    if importlib.util.find_spec("sageattention") is not None:
        calls["SageAttention"] = partial(_sage, q, k, v)
    calls["triton int8"] = partial(operator(setting), q, k, v, spec=spec, mask=None, tensors=none)
    scores = AttentionSpec(size, kind="int8_qk")
    calls["triton int8_qk"] = partial(operator(setting), q, k, v, spec=scores, mask=None, tensors=none)
    calls["quantize alone"] = partial(quantize, q, k, v, tensors=none, spec=spec)
    calls["attend alone"] = partial(attend, given._replace(y=torch.empty_like(q)), sizes, form)
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
