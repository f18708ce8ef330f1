"""The registered operator qvgen::packed_linear and its Python front.

    qvgen::packed_linear(Tensor x, Tensor[] weight, Tensor?[] tensors, str spec, str kernel) -> Tensor

``tensors`` are the fields of LinearTensors in their order.

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

from qvgen_kernels.contract import LinearSpec, LinearTensors
from qvgen_kernels.registry import get_backend

__all__ = ["check_inputs", "no_backward", "packed_linear", "prepack"]

_INPUT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_NAME = "qvgen::packed_linear"
_NOTHING = LinearTensors()

_library = torch.library.Library("qvgen", "FRAGMENT")
_library.define(
    "packed_linear(Tensor x, Tensor[] weight, Tensor?[] tensors, str spec, str kernel) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def check_inputs(x: Tensor, tensors: LinearTensors, spec: LinearSpec, *, dtype: torch.dtype | None = None) -> None:
    """Check what can be checked without reading a value: reading one would stall a GPU in every layer.

    Args:
        x: The rows.
        tensors: The tensors of the call.
        spec: The layer.
        dtype: T where steps before the layer give x another type than it has; None: x's.
    """
    dtype = dtype or x.dtype
    if x.dtype not in _INPUT_DTYPES:
        raise ValueError(f"x is {x.dtype}; use torch.float32, torch.bfloat16 or torch.float16")
    if x.ndim < 1 or x.shape[-1] != spec.in_features:
        raise ValueError(f"x has shape {list(x.shape)}; its last dimension must be in_features={spec.in_features}")
    rows, outputs = prod(x.shape[:-1]), spec.out_features
    shapes: dict[str, tuple[int, ...]] = {
        "bias": (outputs,),
        "clip_low": (rows,),
        "clip_high": (rows,),
        "input_scale": (spec.in_features,),
        "row_scale": (rows,),
        "row_zero_point": (rows,),
        "branch_down": (spec.branch_rank, spec.in_features),
        "branch_up": (outputs, spec.branch_rank),
        "gate": (_gate_rows(tensors.gate, rows), outputs),
        "residual": (rows, outputs),
    }
    dtypes = {
        "branch_down": _INPUT_DTYPES,
        "branch_up": _INPUT_DTYPES,
        "gate": (dtype, torch.float32),
        "residual": (dtype,),
    }
    for name, tensor in tensors._asdict().items():
        if tensor is None:
            continue
        allowed = dtypes.get(name, (torch.float32,))
        if tensor.shape != shapes[name] or tensor.dtype not in allowed:
            wanted = "floating point" if allowed is _INPUT_DTYPES else " or ".join(map(str, dict.fromkeys(allowed)))
            given = f"{tensor.dtype} {list(tensor.shape)}"
            raise ValueError(f"{name} is {given}; it must be {wanted} {list(shapes[name])}")
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device} and x on {x.device}; move them to one device")
    for name in _needed(spec):
        if getattr(tensors, name) is None:
            raise ValueError(f"{name} is missing; a layer of {_kind(spec)} needs it")


def _gate_rows(gate: Tensor | None, rows: int) -> int:
    """Rows S of a gate, each for M / S rows of x."""
    if gate is None or gate.ndim == 0:
        return 1
    count = gate.shape[0]
    if (rows % count if count else rows) != 0:
        raise ValueError(
            f"gate has {count} rows, which do not divide the {rows} rows of x; give one row per sample, or per row"
        )
    return count


def _needed(spec: LinearSpec) -> list[str]:
    names = ["branch_down", "branch_up"] if spec.branch_rank else []
    if spec.activation_range == "static":
        names += ["row_scale", *(["row_zero_point"] if spec.activation_zero_point == "integer" else [])]
    return names


def _kind(spec: LinearSpec) -> str:
    return f"activation_range={spec.activation_range!r} and branch_rank={spec.branch_rank}"


def _packed_linear(
    x: Tensor, weight: Sequence[Tensor], tensors: Sequence[Tensor | None], spec: str, kernel: str
) -> Tensor:
    parsed, named = LinearSpec.from_string(spec), LinearTensors(*tensors)
    check_inputs(x, named, parsed)
    rows = x.reshape(-1, parsed.in_features) if x.numel() else x.new_empty(prod(x.shape[:-1]), parsed.in_features)
    y = get_backend(kernel).linear(rows, weight, tensors=named, spec=parsed)
    return y.reshape(*x.shape[:-1], parsed.out_features)


def _fake(
    x: Tensor,
    weight: Sequence[Tensor],  # noqa: ARG001 - the operator's signature
    tensors: Sequence[Tensor | None],
    spec: str,
    kernel: str,  # noqa: ARG001
) -> Tensor:
    parsed = LinearSpec.from_string(spec)
    check_inputs(x, LinearTensors(*tensors), parsed)
    return x.new_empty((*x.shape[:-1], parsed.out_features))


def no_backward(ctx: object, grad: Tensor) -> NoReturn:  # noqa: ARG001 - autograd's signature
    """Refuse a backward pass.

    Raises:
        RuntimeError: Always.
    """
    raise RuntimeError(
        "packed_linear has no gradient; train the fake-quantized layer and fold it, or use torch.no_grad()"
    )


_library.impl("packed_linear", _packed_linear, "CompositeExplicitAutograd")
torch.library.register_fake(_NAME, _fake, lib=_library)
torch.library.register_autograd(_NAME, no_backward, lib=_library)


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
    tensors: LinearTensors = _NOTHING,
    spec: LinearSpec,
    kernel: str,
) -> Tensor:
    """Quantize x on the fly and multiply it with a packed weight, as kernels/README.md defines it.

    Args:
        x: float32, bfloat16 or float16 [..., K], any strides; M is the product of its leading sizes.
        weight: what :func:`prepack` returned for the same spec and kernel.
        tensors: bias, clips, smoothing, static scales, low-rank branch, gate and residual, as far as there are any.
        spec: the layer.
        kernel: a resolved backend name (``resolve_kernel(...).name``).

    Returns:
        [..., N] of x's dtype, contiguous; a row with a NaN is NaN (with an infinity, too, if ranges are dynamic),
        the others are untouched.

    Raises:
        ValueError: wrong dtype, shape or device, a tensor that the spec needs and is missing, or unknown kernel.
    """
    y: Tensor = torch.ops.qvgen.packed_linear(x, list(weight), list(tensors), spec.to_string(), kernel)
    return y
