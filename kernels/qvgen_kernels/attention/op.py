"""The registered operator qvgen::attention and its Python front.

    qvgen::attention(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor?[] tensors, str spec, str kernel) -> Tensor

torch.compile sees one opaque node with a known output. Inference only: a backward pass raises.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

from qvgen_kernels.attention.contract import AttentionSpec, AttentionTensors, check_tensors
from qvgen_kernels.attention.cpu import VARIANTS, cpu_attention
from qvgen_kernels.attention.reference import reference_attention
from qvgen_kernels.attention.triton import backend as triton_backend
from qvgen_kernels.cpu_library import supported
from qvgen_kernels.errors import KernelUnavailableError

__all__ = ["attention", "attention_kernels", "resolve_attention"]

_NAME = "qvgen::attention"
_NOTHING = AttentionTensors()
_REFERENCE = "reference"

_library = torch.library.Library("qvgen", "FRAGMENT")
_library.define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor?[] tensors, str spec, str kernel) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def attention_kernels(device: torch.device) -> dict[str, str | None]:
    """Every kernel by name, the fastest first, with the reason why it does not run on a device; None where it does."""
    elsewhere = None if device.type == "cpu" else f"it runs on a CPU, and the tensors are on {device.type}"
    on_a_cpu = {name: elsewhere or supported(name) for name in VARIANTS}
    return {**on_a_cpu, triton_backend.NAME: triton_backend.refusal(device), _REFERENCE: None}


def resolve_attention(kernel: str, *, device: torch.device) -> str:
    """The kernel of a name; of ``auto``, the first that runs on the device.

    Raises:
        ValueError: there is no such kernel.
        KernelUnavailableError: it does not run here; the text says why.
    """
    kernels = attention_kernels(device)
    if kernel == "auto":
        return next(name for name, reason in kernels.items() if reason is None)
    if kernel not in kernels:
        raise ValueError(f"kernel={kernel!r} is unknown; use auto, {', '.join(kernels)}")
    if (reason := kernels[kernel]) is not None:
        raise KernelUnavailableError(f"kernel={kernel} can't compute attention here: {reason}")
    return kernel


def _attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, tensors: Sequence[Tensor | None], spec: str, kernel: str
) -> Tensor:
    parsed, named = AttentionSpec.from_string(spec), AttentionTensors(*tensors)
    check_tensors(q, k, v, mask=mask, tensors=named, spec=parsed)
    name = resolve_attention(kernel, device=q.device)
    if name == _REFERENCE:
        return reference_attention(q, k, v, mask=mask, tensors=named, spec=parsed)
    if name == triton_backend.NAME:
        return triton_backend.triton_attention(q, k, v, mask=mask, tensors=named, spec=parsed)
    return cpu_attention(q, k, v, mask=mask, tensors=named, spec=parsed, variant=name)


def _fake(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, tensors: Sequence[Tensor | None], spec: str, kernel: str
) -> Tensor:
    del kernel
    check_tensors(q, k, v, mask=mask, tensors=AttentionTensors(*tensors), spec=AttentionSpec.from_string(spec))
    return torch.empty_like(q, memory_format=torch.contiguous_format)


def _no_backward(ctx: object, grad: Tensor) -> NoReturn:  # noqa: ARG001 - autograd's signature
    raise RuntimeError("qvgen::attention has no gradient; use it under torch.no_grad()")


_library.impl("attention", _attention, "CompositeExplicitAutograd")
torch.library.register_fake(_NAME, _fake, lib=_library)
torch.library.register_autograd(_NAME, _no_backward, lib=_library)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    spec: AttentionSpec,
    mask: Tensor | None = None,
    tensors: AttentionTensors = _NOTHING,
    kernel: str = "auto",
) -> Tensor:
    """Attention with 8-bit queries, keys, probabilities and values, as kernels/attention.md defines it.

    Args:
        q: float32, bfloat16 or float16 queries [B, H, M, D]; any strides.
        k: Keys [B, H, N, D] of the same type.
        v: Values [B, H, N, D] of the same type.
        spec: The attention.
        mask: bool, [B, H, M, N] or 1 in place of any of these sizes: True where a query sees a key; None: everywhere.
        tensors: Clips.
        kernel: ``auto`` or one of :func:`attention_kernels`; every one has the same bits.

    Returns:
        [B, H, M, D] of q's dtype, contiguous. A query that sees no key has zeros. A query that is not finite is NaN, and
        so is everything of a head with a key or a value that is not finite.

    Raises:
        ValueError: wrong types, shapes or devices, or an unknown kernel.
        KernelUnavailableError: the kernel does not run here.
    """
    y: Tensor = torch.ops.qvgen.attention(q, k, v, mask, list(tensors), spec.to_string(), kernel)
    return y
