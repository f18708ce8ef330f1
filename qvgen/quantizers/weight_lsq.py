"""Weights on a learned grid: LSQ+ (arXiv 2004.09576) with a scale and a zero point per row or group.

The scale s and the zero point z are Parameters; the forward pass rounds z (integer grids), the gradient goes straight
through. Their gradients are multiplied by 1 / sqrt(K qmax), K the number of weights that share them, so that one
learning rate fits weights and scales (LSQ, Sec. 2.2).

A learned integer z may leave [0, qmax]: it is clamped where it is used and the gradient ignores the clamp, so that it can
come back. A real z may be any number up to 2^17: a row that does not contain 0 has it outside of its codes. A scale below
1e-8 is used as 1e-8, for the same reason and in the same way.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from qvgen.quant.affine import Rounded, fake_quantize, quantize, round_scale, usable_zero_point
from qvgen.quant.grid import MIN_SCALE, Grid
from qvgen.quant.ste import fake_quantize_backward

ALL_ROWS = slice(None)


class WeightLSQ(nn.Module):
    """Learned scale and zero point of a weight [N, K].

    Attributes:
        scale: Parameter float32 [N, 1] or [N, K / group_size].
        zero_point: Parameter float32 of the same shape, in units of codes; None for symmetric grids.
    """

    scale: nn.Parameter
    zero_point: nn.Parameter | None

    def __init__(self, *, out_features: int, in_features: int, grid: Grid) -> None:
        super().__init__()
        self.grid = grid
        groups = grid.num_groups(in_features)
        self.columns = in_features // groups
        self.scale = nn.Parameter(torch.ones(out_features, groups))
        self.zero_point = None if grid.symmetric else nn.Parameter(torch.zeros(out_features, groups))

    @property
    def gradient_scale(self) -> float:
        """LSQ's factor on the gradients of scale and zero point, 1 / sqrt(columns qmax)."""
        return 1.0 / math.sqrt(self.columns * self.grid.qmax)

    def set_bits_(self, bits: int) -> None:
        """Another width of the same grid; scale and zero point keep their values."""
        self.grid = replace(self.grid, bits=bits)

    @torch.no_grad()
    def start_from_(self, scale: Tensor, zero_point: Tensor) -> None:
        """Take over the scale and zero point that a PTQ method chose (shapes as the Parameters)."""
        self.scale.copy_(scale)
        if self.zero_point is not None:
            self.zero_point.copy_(zero_point)

    @torch.no_grad()
    def qparams(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point as the grid uses them: positive; integer zero points rounded, and inside [0, qmax]."""
        return self.usable(self.scale.detach(), None if self.zero_point is None else self.zero_point.detach())

    def usable(self, scale: Tensor, zero_point: Tensor | None) -> tuple[Tensor, Tensor]:
        """Rows of both Parameters as the grid uses them; see :meth:`qparams`."""
        scale = round_scale(scale.float().clamp(min=MIN_SCALE), self.grid)
        if zero_point is None:
            return scale, torch.zeros_like(scale)
        return scale, usable_zero_point(zero_point.float(), self.grid)

    @torch.no_grad()
    def codes(self, weight: Tensor, *, rows: slice = ALL_ROWS) -> Tensor:
        """Codes [N, K] of a weight [N, K], which fold stores; of some of its rows, where ``rows`` says which they are."""
        zeros = None if self.zero_point is None else self.zero_point.detach()[rows]
        scale, zero_point = self.usable(self.scale.detach()[rows], zeros)
        return quantize(weight, scale=scale, zero_point=zero_point, grid=self.grid)

    @torch.no_grad()
    def fake_quantize(self, weight: Tensor) -> Tensor:
        """Grid values float32 [N, K] of a weight [N, K]; no gradient (:meth:`gradients` has it)."""
        scale, zero_point = self.qparams()
        return fake_quantize(weight, scale=scale, zero_point=zero_point, grid=self.grid)

    @torch.no_grad()
    def gradients(
        self, grad: Tensor, weight: Tensor, *, rounded: Rounded | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Straight-through gradients, with the LSQ factor on scale and zero point.

        Args:
            grad: float32 [N, K], gradient of the fake-quantized weight.
            weight: [N, K].
            rounded: The weight rounded to this grid, where it is known; None: it is computed.

        Returns:
            Gradients of the weight, the scale and the zero point (None for symmetric grids).
        """
        scale, zero_point = self.qparams()
        grad_weight, grad_scale, grad_zero = fake_quantize_backward(
            grad, weight, scale=scale, zero_point=zero_point, grid=self.grid, rounded=rounded
        )
        grad_scale = grad_scale * self.gradient_scale
        return grad_weight, grad_scale, None if self.zero_point is None else grad_zero * self.gradient_scale

    def extra_repr(self) -> str:
        """Grid for ``print(model)``."""
        return f"{self.grid.bits} bits, {self.grid.granularity}, zero_point={self.grid.zero_point}"
