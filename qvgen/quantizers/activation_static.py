"""Activations on a grid that was fixed before: one scale and zero point per layer and sampling step, nothing at run time.

Hardware-friendly static quantization for video diffusion transformers (arXiv 2502.15077) calibrates them for each step of
a sampler, conditional and unconditional calls together. Here the tables are Parameters, so that training can go on from
them; their gradients are LSQ+'s (arXiv 2004.09576), times 1 / sqrt(K qmax) for a layer of K columns, so that one learning
rate fits them and the weights' (LSQ, Sec. 2.2; the number of tokens is left out, it changes from video to video).

A timestep between two steps of the table interpolates linearly between their entries (docs/method.md).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from qvgen.quant.grid import MIN_SCALE, Grid


class ActivationStatic(nn.Module):
    """Learned scale and zero point per sampling step.

    Attributes:
        scale: Parameter float32 [num_bands], > 0; NaN until a PTQ method has set it.
        zero_point: Parameter float32 [num_bands], in units of codes; None for symmetric grids.
    """

    scale: nn.Parameter
    zero_point: nn.Parameter | None

    def __init__(self, *, grid: Grid, num_bands: int, in_features: int) -> None:
        super().__init__()
        self.grid = grid
        self.in_features = in_features
        self.scale = nn.Parameter(torch.full((num_bands,), math.nan))
        self.zero_point = None if grid.symmetric else nn.Parameter(torch.zeros(num_bands))

    @property
    def gradient_scale(self) -> float:
        """LSQ's factor on the gradients of scale and zero point."""
        return 1.0 / math.sqrt(self.in_features * self.grid.qmax)

    @torch.no_grad()
    def start_from_(self, scale: Tensor, zero_point: Tensor) -> None:
        """Take over tables [num_bands] that a PTQ method chose."""
        self.scale.copy_(scale)
        if self.zero_point is not None:
            self.zero_point.copy_(zero_point)

    def tables(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point as float32 [num_bands] each; the zero point is not rounded yet."""
        scale = _scale_gradient(self.scale.float(), self.gradient_scale).clamp(min=MIN_SCALE)
        if self.zero_point is None:
            return scale, torch.zeros_like(scale)
        return scale, _scale_gradient(self.zero_point.float(), self.gradient_scale)

    def extra_repr(self) -> str:
        """Grid for ``print(model)``."""
        return f"{self.grid.bits} bits, static, steps={self.scale.numel()}"


def whole_zero_point(zero_point: Tensor, grid: Grid) -> Tensor:
    """Codes nearest to zero points of any shape; the gradient goes straight through (the clamp too, as WeightLSQ's)."""
    whole: Tensor = _Whole.apply(zero_point, grid)  # type: ignore[no-untyped-call]
    return whole


def _scale_gradient(value: Tensor, factor: float) -> Tensor:
    same: Tensor = _ScaleGradient.apply(value, factor)  # type: ignore[no-untyped-call]
    return same


class _Whole(torch.autograd.Function):
    """Rounded and clamped; an identity to the gradient."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, grid: Grid) -> Tensor:  # noqa: ARG004 - autograd's signature
        return value.round().clamp(max(grid.qmin, 0), grid.qmax)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:  # noqa: ARG004
        return grads[0], None


class _ScaleGradient(torch.autograd.Function):
    """The identity; its gradient is multiplied by a constant."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * ctx.factor, None
