"""The registered operators qvgen::attention and qvgen::attention_backward, and the Python front of the first.

    qvgen::attention(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor[] tensors, str spec, str kernel) -> Tensor
    qvgen::attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor[] tensors, str spec, str kernel)
        -> (Tensor, Tensor, Tensor, Tensor, Tensor)

torch.compile sees two opaque nodes with known outputs. ``tensors`` are both clips or none, because autograd passes no list on
that has a tensor beside None. The second operator gives the gradients of q, k, v and both clips; it has none itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor

from qvgen_kernels.attention.contract import AttentionSpec, AttentionTensors, check_tensors
from qvgen_kernels.attention.cpu import VARIANTS, cpu_attention, cpu_products
from qvgen_kernels.attention.gradient import Products, attention_gradients, reference_products
from qvgen_kernels.attention.reference import reference_attention
from qvgen_kernels.attention.triton import backend as triton_backend
from qvgen_kernels.cpu_library import supported
from qvgen_kernels.errors import KernelUnavailableError
from qvgen_kernels.reference import without_autocast

__all__ = ["attention", "attention_kernels", "resolve_attention"]

_NAME, _BACKWARD = "qvgen::attention", "qvgen::attention_backward"
_NOTHING = AttentionTensors()
_REFERENCE = "reference"

_library = torch.library.Library("qvgen", "FRAGMENT")
_library.define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor[] tensors, str spec, str kernel) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor[] tensors, str spec, str kernel) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
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
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, tensors: Sequence[Tensor], spec: str, kernel: str
) -> Tensor:
    parsed, named = AttentionSpec.from_string(spec), AttentionTensors(*tensors)
    check_tensors(q, k, v, mask=mask, tensors=named, spec=parsed)
    name = resolve_attention(kernel, device=q.device)
    if name == _REFERENCE:
        with without_autocast(q.device):
            return reference_attention(q, k, v, mask=mask, tensors=named, spec=parsed)
    if name == triton_backend.NAME:
        return triton_backend.triton_attention(q, k, v, mask=mask, tensors=named, spec=parsed)
    return cpu_attention(q, k, v, mask=mask, tensors=named, spec=parsed, variant=name)


def _fake(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, tensors: Sequence[Tensor], spec: str, kernel: str
) -> Tensor:
    del kernel
    check_tensors(q, k, v, mask=mask, tensors=AttentionTensors(*tensors), spec=AttentionSpec.from_string(spec))
    return torch.empty_like(q, memory_format=torch.contiguous_format)


def _attention_backward(grad: Tensor, *call: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    q, k, v, mask, tensors, text, kernel = call
    spec, named = AttentionSpec.from_string(text), AttentionTensors(*tensors)
    check_tensors(q, k, v, mask=mask, tensors=named, spec=spec)
    if grad.shape != q.shape or grad.device != q.device:
        raise ValueError(f"grad is {list(grad.shape)} on {grad.device}; it must be {list(q.shape)} on {q.device}, as q")
    if not q.numel() or not k.numel():
        return _gradients_like(grad, *call)
    name, inputs = resolve_attention(kernel, device=q.device), (q, k, v)
    products: Products = partial(reference_products, mask=mask, spec=spec, dtype=v.dtype)
    if name in VARIANTS:
        products = partial(cpu_products, inputs=inputs, mask=mask, tensors=named, spec=spec, variant=name)
    if name == triton_backend.NAME:
        products = partial(triton_backend.triton_products, inputs=inputs, mask=mask, tensors=named, spec=spec)
    with without_autocast(q.device):
        return attention_gradients(grad, inputs, tensors=named, spec=spec, products=products)


def _gradients_like(grad: Tensor, *call: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Zeros of the shapes that the gradients have."""
    q, k, v = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in call[:3])
    clips = grad.new_zeros(2, q.shape[1], dtype=torch.float32)
    return q, k, v, clips[0].clone(), clips[1].clone()


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001 - autograd's signature
    *tensors, clips, ctx.spec, ctx.kernel = inputs
    ctx.save_for_backward(*tensors, *clips)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    q, k, v, mask, *clips = ctx.saved_tensors
    found = torch.ops.qvgen.attention_backward(grad, q, k, v, mask, clips, ctx.spec, ctx.kernel)
    return *found[:3], None, list(found[3:]) if clips else [], None, None


def _no_backward(ctx: object, *grads: Tensor) -> NoReturn:  # noqa: ARG001 - autograd's signature
    raise RuntimeError("qvgen::attention has no second derivative; call backward() without create_graph=True")


_library.impl("attention", _attention, "CompositeExplicitAutograd")
_library.impl("attention_backward", _attention_backward, "CompositeExplicitAutograd")
torch.library.register_fake(_NAME, _fake, lib=_library)
torch.library.register_fake(_BACKWARD, _gradients_like, lib=_library)
torch.library.register_autograd(_NAME, _backward, setup_context=_keep, lib=_library)
torch.library.register_autograd(_BACKWARD, _no_backward, lib=_library)


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
    """Attention with 8-bit queries, keys, probabilities and values, as kernels/attention.md defines it; with a gradient.

    A backward pass gives q, k, v and the clips the gradients of that file's section "Gradient". It keeps the inputs alone,
    and its memory grows with tokens, not with their square. There is no second derivative.

    Args:
        q: float32, bfloat16 or float16 queries [B, H, M, D]; any strides.
        k: Keys [B, H, N, D] of the same type.
        v: Values [B, H, N, D] of the same type.
        spec: The attention.
        mask: bool, [B, H, M, N] or 1 in place of any of these sizes: True where a query sees a key; None: everywhere.
        tensors: Clips.
        kernel: ``auto`` or one of :func:`attention_kernels`; every one has the same outputs, and those in C++
            have the same gradients.

    Returns:
        [B, H, M, D] of q's dtype, contiguous. A query that sees no key has zeros. A query that is not finite is NaN, and
        so is everything of a head with a key or a value that is not finite.

    Raises:
        ValueError: wrong types, shapes or devices, or an unknown kernel.
        KernelUnavailableError: the kernel does not run here.
    """
    clips = [clip for clip in tensors if clip is not None]
    if len(clips) == 1:
        one = q.new_ones(q.shape[1], dtype=torch.float32)
        clips = [one if clip is None else clip for clip in tensors]
    y: Tensor = torch.ops.qvgen.attention(q, k, v, mask, clips, spec.to_string(), kernel)
    return y
