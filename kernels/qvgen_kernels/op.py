"""The registered operator qvgen::packed_linear and its Python front.

    qvgen::packed_linear(Tensor x, Tensor[] weight, Tensor?[] vectors, str spec, str kernel) -> Tensor

``vectors`` are bias, clip_low, clip_high and input_scale, each a Tensor or None.

torch.compile sees one opaque node with a known output, so no compiler can reorder or fuse the arithmetic that
the contract fixes. Inference only: a backward pass raises, since the trainable layer is the fake-quantized
one.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import NoReturn

import torch
from torch import Tensor

from qvgen_kernels.contract import LinearSpec
from qvgen_kernels.registry import get_backend

__all__ = ["packed_linear", "prepack"]

_INPUT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_NAME = "qvgen::packed_linear"
_VECTORS = ("bias", "clip_low", "clip_high", "input_scale")

_library = torch.library.Library("qvgen", "FRAGMENT")
_library.define(
    "packed_linear(Tensor x, Tensor[] weight, Tensor?[] vectors, str spec, str kernel) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _check_inputs(x: Tensor, *, spec: LinearSpec, **vectors: Tensor | None) -> None:
    """Check what can be checked without reading a value: reading one would stall a GPU in every layer."""
    if x.dtype not in _INPUT_DTYPES:
        raise ValueError(f"x is {x.dtype}; use torch.float32, torch.bfloat16 or torch.float16")
    if x.ndim < 1 or x.shape[-1] != spec.in_features:
        raise ValueError(f"x has shape {list(x.shape)}; its last dimension must be in_features={spec.in_features}")
    rows = prod(x.shape[:-1])
    sizes = {"bias": spec.out_features, "clip_low": rows, "clip_high": rows, "input_scale": spec.in_features}
    for name, tensor in vectors.items():
        size = sizes[name]
        if tensor is None:
            continue
        if tensor.dtype != torch.float32 or tensor.ndim != 1 or tensor.shape[0] != size:
            raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)}; it must be torch.float32 [{size}]")
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device} and x on {x.device}; move them to one device")


def _packed_linear(
    x: Tensor, weight: Sequence[Tensor], vectors: Sequence[Tensor | None], spec: str, kernel: str
) -> Tensor:
    parsed, named = LinearSpec.from_string(spec), dict(zip(_VECTORS, vectors, strict=True))
    _check_inputs(x, spec=parsed, **named)
    y = get_backend(kernel).linear(
        x.reshape(-1, parsed.in_features) if x.numel() else x.new_empty(prod(x.shape[:-1]), parsed.in_features),
        weight,
        spec=parsed,
        **named,
    )
    return y.reshape(*x.shape[:-1], parsed.out_features)


def _fake(
    x: Tensor,
    weight: Sequence[Tensor],  # noqa: ARG001 - the operator's signature
    vectors: Sequence[Tensor | None],
    spec: str,
    kernel: str,  # noqa: ARG001
) -> Tensor:
    parsed = LinearSpec.from_string(spec)
    _check_inputs(x, spec=parsed, **dict(zip(_VECTORS, vectors, strict=True)))
    return x.new_empty((*x.shape[:-1], parsed.out_features))


def _backward(ctx: object, grad: Tensor) -> NoReturn:  # noqa: ARG001 - autograd's signature
    raise RuntimeError(
        "packed_linear has no gradient; train the fake-quantized layer and fold it, or use torch.no_grad()"
    )


_library.impl("packed_linear", _packed_linear, "CompositeExplicitAutograd")
torch.library.register_fake(_NAME, _fake, lib=_library)
torch.library.register_autograd(_NAME, _backward, lib=_library)


def prepack(
    planes: Sequence[Tensor], *, scale: Tensor, zero_point: Tensor | None, spec: LinearSpec, kernel: str
) -> list[Tensor]:
    """Bring a layer's canonical tensors into the order of one backend; once, at load.

    Args:
        planes: canonical planes, uint8 (kernels/README.md, "Bytes").
        scale: float32 [N] or [N, K/g].
        zero_point: uint8 ("integer") or float32 ("real"), shaped like scale; None where symmetric.
        spec: the layer.
        kernel: a resolved backend name; the same one must run the layer.

    Returns:
        Tensors for :func:`packed_linear`, on the planes' device. Derived data: do not store them in
        checkpoints.

    Raises:
        ValueError: unknown kernel, or tensors that do not fit the spec.
    """
    return get_backend(kernel).prepack(planes, scale=scale, zero_point=zero_point, spec=spec)


def packed_linear(
    x: Tensor,
    *,
    weight: Sequence[Tensor],
    bias: Tensor | None = None,
    clips: tuple[Tensor | None, Tensor | None] = (None, None),
    input_scale: Tensor | None = None,
    spec: LinearSpec,
    kernel: str,
) -> Tensor:
    """Quantize x on the fly and multiply it with a packed weight, as kernels/README.md defines it.

    Args:
        x: float32, bfloat16 or float16 [..., K], any strides.
        weight: what :func:`prepack` returned for the same spec and kernel.
        bias: float32 [N].
        clips: clip_low and clip_high, float32 [M] each, factors on every row's minimum and maximum (M = product of x's
            leading sizes); None = 1.
        input_scale: float32 [K], a factor on each column of x, before all else; None = 1.
        spec: the layer.
        kernel: a resolved backend name (``resolve_kernel(...).name``).

    Returns:
        [..., N] of x's dtype, contiguous; a row with a NaN or infinity is NaN, the others are untouched.

    Raises:
        ValueError: wrong dtype, shape or device, or unknown kernel.
    """
    vectors = [bias, *clips, input_scale]
    y: Tensor = torch.ops.qvgen.packed_linear(x, list(weight), vectors, spec.to_string(), kernel)
    return y
