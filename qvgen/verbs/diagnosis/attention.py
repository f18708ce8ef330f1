"""Attention in 8 bits on a device: which kernel it gets, whether it computes what it claims, and its times beside bfloat16's.

Every kernel is held to the exact reference on the CPU, to the bit. With ``int8_qk`` values are whole numbers here, whose sums
are exact in any order: then nothing that a kernel computes is free.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from qvgen.quant.attention_profile import AttentionKind
from qvgen.verbs.diagnosis.machine import without_paths
from qvgen.verbs.diagnosis.self_test import Check
from qvgen.verbs.diagnosis.speed import milliseconds
from qvgen_kernels.attention import AttentionSpec, attention, attention_kernels
from qvgen_kernels.attention.cpu import VARIANTS

HEADS = (64, 72, 128)
"""Sizes of heads that are tested: those of the models, and one that no block of 64 fills."""

_CASES = (("outputs of float32", torch.float32), ("outputs of bfloat16", torch.bfloat16))
_QUERIES, _KEYS = 5, 130
_TIMED = {"cpu": (1, 1024)}
"""Heads and tokens that are timed, by the type of the device; 24 heads of 4096 tokens elsewhere."""


def chosen_attention(device: torch.device) -> tuple[str, dict[str, str]]:
    """The kernel that attention in 8 bits gets, and why not those before it: name -> reason."""
    refused = {}
    for name, reason in attention_kernels(device).items():
        if reason is None:
            return name, refused
        if device.type == "cpu" or name not in VARIANTS:  # a GPU has none of the CPU's
            refused[name] = without_paths(reason)
    raise AssertionError("the reference runs everywhere")


def attention_checks(device: torch.device) -> Iterator[Check]:
    """All kernels that run on a device, but the reference on the CPU, which is what they are held to."""
    names = [name for name, reason in attention_kernels(device).items() if reason is None]
    for kind in get_args(AttentionKind):
        for size in HEADS:
            for what, dtype in _CASES:
                q, k, v, mask = _inputs(size, kind=kind, dtype=dtype)
                spec = AttentionSpec(size, kind=kind)
                expected = attention(q, k, v, spec=spec, mask=mask, kernel="reference")
                for name in names:
                    if (name, device.type) != ("reference", "cpu"):
                        failure = _differs((q, k, v, mask), spec, expected, kernel=name, device=device)
                        shape = f"{_QUERIES}x{_KEYS}x{size}"
                        yield Check(
                            device=str(device),
                            kernel=name,
                            kind=f"attention {kind}",
                            shape=shape,
                            what=what,
                            failure=failure,
                        )


def _inputs(size: int, *, kind: AttentionKind, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries of very different sizes, keys with a mean, values (whole for int8_qk) and a mask that hides some keys."""
    generator = torch.Generator().manual_seed(size)
    q = torch.randn(1, 2, _QUERIES, size, generator=generator) * 10.0 ** torch.linspace(-2, 1, _QUERIES)[:, None]
    k = torch.randn(1, 2, _KEYS, size, generator=generator) + 2 * torch.randn(1, 2, 1, size, generator=generator)
    v = torch.randn(1, 2, _KEYS, size, generator=generator)
    if kind != "int8":
        v = (2 * v).round().clamp(-4, 4)
    mask = torch.rand(1, 1, 1, _KEYS, generator=generator) > 0.3
    return q.to(dtype), k.to(dtype), v.to(dtype), mask


def _differs(
    given: tuple[Tensor, ...], spec: AttentionSpec, expected: Tensor, *, kernel: str, device: torch.device
) -> str:
    """What is wrong with the outputs of a kernel; empty where nothing is."""
    try:
        q, k, v, mask = (tensor.to(device) for tensor in given)
        found = attention(q, k, v, spec=spec, mask=mask, kernel=kernel).cpu()
    except (RuntimeError, ValueError, TypeError, MemoryError) as error:
        return without_paths(f"{type(error).__name__}: {error}")
    count = int((found != expected).sum())
    off = float((found.double() - expected.double()).abs().max())
    return f"{count} of {found.numel()} outputs differ, by {off:.3g} at most" if count else ""


def attention_speed(device: torch.device) -> Iterator[dict[str, Any]]:
    """Median milliseconds of both kinds and two sizes of heads, beside torch's attention in bfloat16."""
    heads, tokens = _TIMED.get(device.type, (24, 4096))
    kernel, _ = chosen_attention(device)
    for size in (64, 128):
        q, k, v = (torch.randn(1, heads, tokens, size, device=device).bfloat16() for _ in range(3))
        full = milliseconds(lambda q=q, k=k, v=v: scaled_dot_product_attention(q, k, v), device)
        for kind in get_args(AttentionKind):
            spec = AttentionSpec(size, kind=kind)
            found = milliseconds(lambda q=q, k=k, v=v, spec=spec: attention(q, k, v, spec=spec), device)
            yield {
                "device": str(device), "kind": f"attention {kind}", "shape": f"{heads}x{tokens}x{size}", "kernel": kernel,
                "bf16_ms": full, "packed_ms": found, "times_bf16": full / found, "bytes_per_weight": None,
            }  # fmt: skip
