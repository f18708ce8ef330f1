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
        """Map x [M, K], M > 0, to [M, N] of T, as ``linear`` of the input after its steps."""


def _checked_rows(
    x: Tensor, before: InputTensors, steps: InputSteps, tensors: LinearTensors, spec: LinearSpec
) -> Tensor:
    """Rows [M, K] of x; raises ValueError for what does not fit."""
    check_inputs(x, tensors, spec, dtype=steps.output_dtype(x))
    rows = x.reshape(-1, spec.in_features) if x.numel() else x.new_empty(prod(x.shape[:-1]), spec.in_features)
    check_steps(rows, before, steps)
    return rows


def _fused_linear(
    x: Tensor, before: Sequence[Tensor | None], steps: str, weight: Sequence[Tensor], tensors: Sequence[Tensor | None],
    spec: str, kernel: str,
) -> Tensor:  # fmt: skip
    parsed, asked = LinearSpec.from_string(spec), InputSteps.from_string(steps)
    given, named = InputTensors(*before), LinearTensors(*tensors)
    rows = _checked_rows(x, given, asked, named, parsed)
    backend = get_backend(kernel)
    if isinstance(backend, FusesSteps) and len(rows):
        y = backend.fused_linear(rows, weight, before=given, steps=asked, tensors=named, spec=parsed)
    else:
        with without_autocast(x.device):
            rows = apply_steps(rows, tensors=given, steps=asked)
        y = backend.linear(rows, weight, tensors=named, spec=parsed)
    return y.reshape(*x.shape[:-1], parsed.out_features)


def _fake(
    x: Tensor, before: Sequence[Tensor | None], steps: str,
    weight: Sequence[Tensor],  # noqa: ARG001 - the operator's signature
    tensors: Sequence[Tensor | None], spec: str,
    kernel: str,  # noqa: ARG001
) -> Tensor:  # fmt: skip
    parsed, asked = LinearSpec.from_string(spec), InputSteps.from_string(steps)
    _checked_rows(x, InputTensors(*before), asked, LinearTensors(*tensors), parsed)
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
