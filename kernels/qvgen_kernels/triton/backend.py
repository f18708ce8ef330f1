"""The backend ``triton``: what it needs, and a call from rows to outputs. Triton itself is imported at the first call."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from qvgen_kernels.contract import LinearSpec, LinearTensors
from qvgen_kernels.hadamard import paley_factor
from qvgen_kernels.input_steps import InputSteps, InputTensors, apply_steps
from qvgen_kernels.triton.layout import PackedWeight, arrange, fits, named_weight
from qvgen_kernels.triton.tiles import Card, tile_of
from qvgen_kernels.weight import CanonicalPrepack, CanonicalWeight

if TYPE_CHECKING:
    from qvgen_kernels.triton.quantize_form import StepsBefore

__all__ = ["Product", "TritonBackend", "device_card"]

OLDEST = (8, 0)
"""Compute capability from which on there are matrix instructions for signed bytes as Triton makes them."""

OLDEST_TRITON = (3, 6)

LONGEST_RUN = 16384
"""Columns that one program of the rotation can hold: the largest power of two in a rotation."""


class Product(NamedTuple):
    """The arguments of a product.

    Attributes:
        operands: Quantized rows (quantize_form.Operands).
        weight: The packed weight.
        y: Outputs to be filled, contiguous [M, N].
        branch: (x down^T) up^T [M, N] or None.
        tensors: Bias, gate and residual.
        spec: The layer.
    """

    operands: Any
    weight: PackedWeight
    y: Tensor
    branch: Tensor | None
    tensors: LinearTensors
    spec: LinearSpec


class TritonBackend(CanonicalPrepack):
    """Kernels for NVIDIA cards from compute capability 8.0 on, and for AMD cards; auto prefers them to the reference."""

    name = "triton"
    priority = 60
    device_types = ("cuda",)

    def refusal(self, spec: LinearSpec, *, device: torch.device) -> str | None:
        """A sentence on what is missing on this machine, or what of the layer does not run; None where all is there."""
        if device.type != "cuda":
            return f"kernel=triton runs on CUDA and ROCm devices, not on {device}"
        return _missing() or _card_refusal(device) or _layer_refusal(spec)

    def _arrange(self, parts: Sequence[CanonicalWeight], *, spec: LinearSpec) -> list[Tensor]:
        """Bytes that operands are unpacked from in registers (layout.py); on the planes' device."""
        return arrange(parts, spec=spec)

    def linear(self, x: Tensor, weight: Sequence[Tensor], *, tensors: LinearTensors, spec: LinearSpec) -> Tensor:
        """Map x [M, K] to [M, N] of x's dtype; inputs as the operator has checked them. Nothing waits for the device."""
        if not len(x):
            return x.new_empty(0, spec.out_features)
        return self._run(x, weight, before=None, tensors=tensors, spec=spec)

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
        """Map x [M, K] or [B, n, K] to [M, N] of T; the steps are computed while rows are quantized, with the same bits.

        Torch's operators come first where the quantizer's kernel has no whole row of x (rotations, a low-rank branch, a norm
        with groups or more than 16 384 columns), and where no variant of the function is torch's (function_choice.py).
        """
        from qvgen_kernels.triton.function_choice import variant_of
        from qvgen_kernels.triton.quantize_form import StepsBefore, holds_whole_rows

        by_torch = spec.rotation or spec.branch_rank or (steps.norm != "none" and not holds_whole_rows(spec))
        dtype = steps.output_dtype(x)
        variant = None if by_torch else variant_of(steps.function, dtype, x.device)
        if variant is None:
            with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
                x = apply_steps(x.reshape(-1, spec.in_features), tensors=before, steps=steps)
            return self.linear(x, weight, tensors=tensors, spec=spec)
        return self._run(x, weight, before=StepsBefore(steps, before, variant), tensors=tensors, spec=spec)

    def _run(
        self,
        x: Tensor,
        weight: Sequence[Tensor],
        *,
        before: StepsBefore | None,
        tensors: LinearTensors,
        spec: LinearSpec,
    ) -> Tensor:
        """The outputs of x [M, K] or, with steps, [B, n, K]; M > 0."""
        from qvgen_kernels.triton.quantize import quantize_rows

        named = self._named(weight, spec)
        rows = x.numel() // spec.in_features
        y = x.new_empty(rows, spec.out_features, dtype=None if before is None else before.steps.output_dtype(x))
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            operands = quantize_rows(x, spec=spec, tensors=tensors, before=before)
            branch = _branch(x, tensors) if spec.branch_rank else None
            self._multiply(Product(operands, named, y, branch, tensors, spec))
        return y

    def _named(self, weight: Sequence[Tensor], spec: LinearSpec) -> PackedWeight:
        """The prepacked tensors by name."""
        return named_weight(weight, spec=spec)

    def _multiply(self, product: Product) -> None:
        """Fill y with the outputs."""
        from qvgen_kernels.triton.gemm import multiply

        y, tensors, spec = product.y, product.tensors, product.spec
        tail = tensors.gate is not None or tensors.residual is not None
        tile = tile_of(spec, rows=len(y), card=_card(y.device), tail=tail)
        multiply(product.operands, product.weight, y=y, branch=product.branch, tensors=tensors, spec=spec, tile=tile)


def _branch(x: Tensor, tensors: LinearTensors) -> Tensor:
    """(x down^T) up^T in x's dtype [M, N], as the reference computes it; the epilogue adds it to the sums."""
    assert tensors.branch_down is not None  # the operator has checked both
    assert tensors.branch_up is not None
    return functional.linear(functional.linear(x, tensors.branch_down.to(x.dtype)), tensors.branch_up.to(x.dtype))


@cache
def _missing() -> str | None:
    """Why Triton can't be used in this process, as far as that is no matter of the card."""
    try:
        found = importlib.util.find_spec("triton")
    except (ImportError, ValueError):
        found = None
    if found is None or found.origin is None:
        return "Triton is not installed; torch for CUDA brings it on Linux, elsewhere pip install triton"
    try:
        from triton import __version__ as version
    except Exception as error:  # a broken installation may raise anything
        return f"Triton can't be imported: {type(error).__name__}: {' '.join(str(error).split())}; reinstall it"
    if tuple(int(part) for part in version.split("+")[0].split(".")[:2]) < OLDEST_TRITON:
        return f"Triton is {version}; it must be {'.'.join(map(str, OLDEST_TRITON))} or newer: take a newer torch"
    return None if torch.cuda.is_available() else "torch finds no GPU; look at nvidia-smi and torch.version.cuda"


@cache
def _card(device: torch.device) -> Card:
    """The card by which tiles are chosen; the CPU, on which Triton's interpreter runs, counts as a small card."""
    if device.type != "cuda":
        return Card((0, 0), 1)
    capability = (0, 0) if torch.version.hip is not None else torch.cuda.get_device_capability(device)
    properties = torch.cuda.get_device_properties(device)
    return Card(capability, properties.multi_processor_count, properties.name)


def device_card(device: torch.device) -> Card:
    """The facts of a card, its name among them."""
    return _card(device)


def _card_refusal(device: torch.device) -> str | None:
    if device.index is not None and device.index >= torch.cuda.device_count():
        return f"there is no {device}: torch finds {torch.cuda.device_count()} GPUs"
    capability = _card(device).capability
    if torch.version.hip is None and capability < OLDEST:
        name = torch.cuda.get_device_name(device)
        return f"{name} has compute capability {capability[0]}.{capability[1]}; it must be 8.0 or higher"
    return None


def _layer_refusal(spec: LinearSpec) -> str | None:
    if not fits(spec):
        return f"{spec.group_size} columns could sum to more than int32 holds on the way; use a group size"
    if spec.rotation:
        run = spec.rotation // (1 if spec.rotation_kind == "regular" else paley_factor(spec.rotation))
        if run > LONGEST_RUN:
            return f"rotation={spec.rotation} has runs of {run} columns; up to {LONGEST_RUN} fit into a program"
    return None
