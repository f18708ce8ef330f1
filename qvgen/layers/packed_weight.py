"""The integer codes of one weight with their scales and zero points, as a checkpoint stores them."""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor, nn

from qvgen.quant.affine import dequantize
from qvgen.quant.grid import Grid
from qvgen.quant.packing import pack_codes, unpack_codes
from qvgen.quantizers.weight_lsq import ALL_ROWS, WeightLSQ

ABOVE_ZERO = (1e-45, math.inf)
"""Range of a scale: from below the smallest float32 above 0."""


@cache
def _plane_widths(in_features: int, bits: int) -> tuple[int, ...]:
    """Bytes of a row in each plane, read off from one packed row."""
    codes = torch.zeros(1, in_features, dtype=torch.uint8, device="cpu")
    return tuple(plane.shape[1] for plane in pack_codes(codes, bits=bits))


class PackedWeight(nn.Module):
    """Canonical tensors (kernels/README.md) of a weight [N, K].

    Args:
        in_features: K.
        out_features: N.
        grid: Grid of the weight.
        device: Where the empty buffers are made (``meta`` for shapes alone).

    Attributes:
        codes: frozen Parameter uint8, first plane of the codes; ``codes_high``: second plane (3 bits) or None. Parameters,
            because the offloading of accelerate and diffusers leaves buffers on the device.
        weight_scale: buffer float32 [N] or [N, K / group_size].
        weight_zero_point: buffer uint8 (integer) or float32 (real) like the scale; None for symmetric weights.
    """

    codes: Tensor
    codes_high: Tensor | None
    weight_scale: Tensor
    weight_zero_point: Tensor | None

    def __init__(self, in_features: int, out_features: int, *, grid: Grid, device: torch.device | str = "cpu") -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight_grid = grid
        groups = grid.num_groups(in_features)
        shape = (out_features, groups) if grid.group_size else (out_features,)
        zero_dtype = torch.float32 if grid.zero_point == "real" else torch.uint8
        widths = _plane_widths(in_features, grid.bits)
        empty = [torch.zeros(out_features, width, dtype=torch.uint8, device=device) for width in widths]
        self.register_parameter("codes", nn.Parameter(empty[0], requires_grad=False))
        self.register_parameter("codes_high", nn.Parameter(empty[1], requires_grad=False) if len(empty) == 2 else None)
        self.register_buffer("weight_scale", torch.ones(shape, device=device))
        zeros = None if grid.symmetric else torch.zeros(shape, dtype=zero_dtype, device=device)
        self.register_buffer("weight_zero_point", zeros)

    @torch.no_grad()
    def store_scales_(self, quantizer: WeightLSQ) -> None:
        """Take over a quantizer's scales and zero points."""
        scale, zero_point = quantizer.qparams()
        self.weight_scale.copy_(scale.reshape(self.weight_scale.shape))
        if self.weight_zero_point is not None:
            self.weight_zero_point.copy_(zero_point.reshape(self.weight_scale.shape))

    @torch.no_grad()
    def store_rows_(self, weight: Tensor, quantizer: WeightLSQ, *, rows: slice) -> None:
        """Take over the codes that some rows [n, K] of a weight have under its quantizer."""
        codes = quantizer.codes(weight, rows=rows)
        if self.weight_grid.symmetric:
            codes = (codes.to(torch.int16) + 2 ** (self.weight_grid.bits - 1)).to(torch.uint8)
        for mine, plane in zip(self.planes, pack_codes(codes, bits=self.weight_grid.bits), strict=True):
            mine[rows].copy_(plane)

    def value_ranges(self) -> dict[str, tuple[float, float]]:
        """Lowest and highest value that buffers may hold to mean anything, by name; scales are above 0."""
        integer = self.weight_grid.zero_point == "integer"
        return {
            "weight_scale": ABOVE_ZERO,
            **({"weight_zero_point": (0.0, float(self.weight_grid.qmax))} if integer else {}),
        }

    def forward(self) -> tuple[tuple[Tensor, ...], Tensor, Tensor | None]:
        """Do what :meth:`canonical` does, called as a module, so that the hooks of offloading bring the tensors."""
        return self.canonical()

    def canonical(self) -> tuple[tuple[Tensor, ...], Tensor, Tensor | None]:
        """Planes, scale and zero point: what a backend prepares; they stay where they are while the layer's are moved."""
        zero_point = self.weight_zero_point
        planes = tuple(plane.detach() for plane in self.planes)
        return planes, self.weight_scale.detach(), None if zero_point is None else zero_point.detach()

    @property
    def planes(self) -> tuple[Tensor, ...]:
        """Canonical planes of the codes."""
        return (self.codes,) if self.codes_high is None else (self.codes, self.codes_high)

    @torch.no_grad()
    def integer_codes(self, rows: slice = ALL_ROWS) -> Tensor:
        """Codes as the grid has them: uint8 (asymmetric) or int8 (symmetric), [N, K] or some rows of them."""
        grid = self.weight_grid
        codes = unpack_codes([plane[rows] for plane in self.planes], bits=grid.bits, in_features=self.in_features)
        return (codes.to(torch.int16) - 2 ** (grid.bits - 1)).to(torch.int8) if grid.symmetric else codes

    @torch.no_grad()
    def dequantized_weight(self, rows: slice = ALL_ROWS) -> Tensor:
        """float32 [N, K] grid values of the weight or some rows of it, in the layer's own coordinates (rotated, smoothed)."""
        scale = self.weight_scale.reshape(self.out_features, -1)[rows]
        zero_point = torch.zeros_like(scale)
        if self.weight_zero_point is not None:
            zero_point = self.weight_zero_point.reshape(self.out_features, -1)[rows].float()
        return dequantize(self.integer_codes(rows), scale=scale, zero_point=zero_point, grid=self.weight_grid)
