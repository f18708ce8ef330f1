"""The registered operator qvgen::fused_linear: the packed linear with the steps of a block before it, as one node.

    qvgen::fused_linear(Tensor x, Tensor?[] before, str steps, Tensor[] weight, Tensor?[] tensors, str spec, str kernel)
        -> Tensor

``before`` are the fields of InputTensors in their order, ``steps`` is InputSteps.to_string(); the rest is packed_linear's.

A backend that computes the steps while it quantizes has a method ``fused_linear`` beside ``linear``, with ``before`` and
``steps`` besides. For any other one the steps are torch's operators (:mod:`qvgen_kernels.input_steps`), and the bits are the
same. Nothing of a model depends on which it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from qvgen_kernels.contract import LinearSpec, LinearTensors
from qvgen_kernels.input_steps import InputSteps, InputTensors, apply_steps, check_steps
from qvgen_kernels.op import check_inputs, no_backward
from qvgen_kernels.reference import without_autocast
from qvgen_kernels.registry import get_backend

__all__ = ["FusesSteps", "fused_linear"]

_NAME = "qvgen::fused_linear"
_NOTHING, _NO_STEPS, _NONE_BEFORE = LinearTensors(), InputSteps(), InputTensors()

_library = torch.library.Library("qvgen", "FRAGMENT")
_library.define(
    "fused_linear(Tensor x, Tensor?[] before, str steps, Tensor[] weight, Tensor?[] tensors, str spec, str kernel) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@runtime_checkable
class FusesSteps(Protocol):
    """A backend that computes the steps before a layer itself."""

    def fused_linear(
        self,
        x: Tensor,
        weight: Sequence[Tensor],
        *,
        before: InputTensors,
        steps: InputSteps,
        tensors: LinearTensors,
        spec: LinearSpec,
    ) -> Tensor:
        """Map x [M, K], or [B, n, K] with M = B n, to [M, N] of T, as ``linear`` of the input after its steps; M > 0."""


def _check(x: Tensor, before: InputTensors, steps: InputSteps, tensors: LinearTensors, spec: LinearSpec) -> None:
    """Raise ValueError for what does not fit."""
    check_inputs(x, tensors, spec, dtype=steps.output_dtype(x))
    check_steps(x, before, steps)


def _rows(x: Tensor, columns: int) -> Tensor:
    """[M, K] of x, copied only where its rows can't be told by one stride."""
    return x.reshape(-1, columns) if x.numel() else x.new_empty(prod(x.shape[:-1]), columns)


def _rows_or_samples(x: Tensor, columns: int) -> Tensor:
    """[M, K] or, where that would be a copy, [B, n, K]."""
    if x.ndim == 3 and x.shape[0] > 1 and x.stride(0) != x.shape[1] * x.stride(1):
        return x
    return _rows(x, columns)


def _fused_linear(
    x: Tensor, before: Sequence[Tensor | None], steps: str, weight: Sequence[Tensor], tensors: Sequence[Tensor | None],
    spec: str, kernel: str,
) -> Tensor:  # fmt: skip
    parsed, asked = LinearSpec.from_string(spec), InputSteps.from_string(steps)
    given, named = InputTensors(*before), LinearTensors(*tensors)
    _check(x, given, asked, named, parsed)
    backend = get_backend(kernel)
    if isinstance(backend, FusesSteps) and x.numel():
        rows = _rows_or_samples(x, parsed.in_features)
        y = backend.fused_linear(rows, weight, before=given, steps=asked, tensors=named, spec=parsed)
    else:
        with without_autocast(x.device):
            rows = apply_steps(_rows(x, parsed.in_features), tensors=given, steps=asked)
        y = backend.linear(rows, weight, tensors=named, spec=parsed)
    return y.reshape(*x.shape[:-1], parsed.out_features)


def _fake(
    x: Tensor, before: Sequence[Tensor | None], steps: str,
    weight: Sequence[Tensor],  # noqa: ARG001 - the operator's signature
    tensors: Sequence[Tensor | None], spec: str,
    kernel: str,  # noqa: ARG001
) -> Tensor:  # fmt: skip
    parsed, asked = LinearSpec.from_string(spec), InputSteps.from_string(steps)
    _check(x, InputTensors(*before), asked, LinearTensors(*tensors), parsed)
    return x.new_empty((*x.shape[:-1], parsed.out_features), dtype=asked.output_dtype(x))


_library.impl("fused_linear", _fused_linear, "CompositeExplicitAutograd")
torch.library.register_fake(_NAME, _fake, lib=_library)
torch.library.register_autograd(_NAME, no_backward, lib=_library)


def fused_linear(
    x: Tensor,
    *,
    weight: Sequence[Tensor],
    before: InputTensors = _NONE_BEFORE,
    steps: InputSteps = _NO_STEPS,
    tensors: LinearTensors = _NOTHING,
    spec: LinearSpec,
    kernel: str,
) -> Tensor:  # fmt: skip
    """Norm, modulate, and pass x through a function, then do what :func:`~qvgen_kernels.packed_linear` does.

    Args:
        x: float32, bfloat16 or float16 [..., K], any strides; M is the product of its leading sizes.
        weight: What :func:`~qvgen_kernels.prepack` returned for the same spec and kernel.
        before: Gain, shift and the norm's weight and bias, as far as there are any.
        steps: Norm, function and the type T of the input after them.
        tensors: As for packed_linear; gate and residual are of T (the gate may be float32).
        spec: The layer.
        kernel: A resolved backend name.

    Returns:
        [..., N] of T, contiguous.

    Raises:
        ValueError: As packed_linear; gain without shift, a norm's tensors without a norm, unknown steps.
    """
    y: Tensor = torch.ops.qvgen.fused_linear(
        x, list(before), steps.to_string(), list(weight), list(tensors), spec.to_string(), kernel
    )
    return y
