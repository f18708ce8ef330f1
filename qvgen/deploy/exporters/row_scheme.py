"""The common part of targets with one scale per output row and per token: whether a layer fits, its codes, the product.

    division     s_x = max(max|H x|, 1e-10) / qmax,   q_x = rne(H x / s_x)            comfy-kitchen
    reciprocal   s_x = max(max|x| / qmax, 1e-30),     q_x = rne(x (1 / s_x))          humming

    y = float32(sum q_x q_w) s_x s_w + bias

Both sides are symmetric, scales of inputs float32. H is a regular Hadamard matrix in blocks, or nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from qvgen.deploy.exporters.base import Fit
from qvgen.deploy.exporters.plain_weight import plain_weight
from qvgen.layers.packed_linear import PackedLinear
from qvgen.quant.affine import quantize
from qvgen.quant.grid import MIN_SPAN, Grid, ScaleDtype
from qvgen.quant.hadamard import hadamard_transform
from qvgen.quant.ranges import search_qparams

LOWEST_SCALE = 1e-30
"""Smallest scale of inputs in ``reciprocal`` runtimes; a packed layer's is 1e-8, which tells for rows below 1.3e-6 alone."""
_ARITHMETIC_REASONS = {
    "division": "inputs multiplied by 1 / scale, not divided by it",
    "reciprocal": "inputs divided by the scale, not multiplied by 1 / scale",
}


@dataclass(frozen=True, kw_only=True)
class RowWeight:
    """A weight as row targets take it.

    Attributes:
        codes: int8 [N, K].
        scale: float32 [N].
        rotation: Block of the regular Hadamard matrix; 0 for none.
    """

    codes: Tensor
    scale: Tensor
    rotation: int


@dataclass(frozen=True, kw_only=True)
class RowScheme:
    """The layers that a row target can carry.

    Attributes:
        weight_bits: Most bits of a weight's code.
        activation_bits: Bits to which it can quantize inputs, rising.
        rotations: Blocks of the regular Hadamard matrix that it can have, 0 for none; a weight that is quantized again takes
            the first one that divides its columns.
        arithmetic: How it quantizes inputs, see the module.
        scale_dtype: Precision of a weight's scales; float32 holds those of every other precision.
        own_width: Whether a weight that is quantized again keeps its width; else it gets ``weight_bits``.
    """

    weight_bits: int
    activation_bits: Sequence[int]
    rotations: Sequence[int]
    arithmetic: Literal["division", "reciprocal"] = "division"
    scale_dtype: ScaleDtype = "float32"
    own_width: bool = False

    def input_bits(self, layer: PackedLinear) -> int:
        """Bits that inputs of the layer have here: the narrowest width that is no narrower than the trained one."""
        bits = layer.profile.activation.bits
        return next((width for width in self.activation_bits if width >= bits), self.activation_bits[-1])

    def fit(self, layer: PackedLinear) -> Fit:
        """Whether the layer's codes and the way of its inputs are those of the scheme."""
        weight, inputs = self._weight_reasons(layer), self._input_reasons(layer)
        bits = layer.profile.weight.bits if not weight else self._bits_again(layer)
        return Fit(weight=tuple(weight), inputs=tuple(inputs), runs_as=f"w{bits}a{self.input_bits(layer)}")

    def weight(self, layer: PackedLinear) -> RowWeight:
        """The layer's own codes where they fit; else its plain weight, rotated and quantized again (least error per row)."""
        if not self._weight_reasons(layer):
            rotation = layer.profile.rotation
            return RowWeight(codes=layer.integer_codes(), scale=layer.weight_scale.detach(), rotation=rotation)
        rotation = next(size for size in self.rotations if not size or layer.in_features % size == 0)
        weight = plain_weight(layer)
        if rotation:
            weight = hadamard_transform(weight, block_size=rotation, kind="regular")
        bits = self._bits_again(layer)
        grid = Grid(bits=bits, granularity="per_channel", zero_point="none", scale_dtype=self.scale_dtype)
        scale, zero_point = search_qparams(weight, grid=grid)
        codes = quantize(weight, scale=scale, zero_point=zero_point, grid=grid)
        return RowWeight(codes=codes, scale=scale.reshape(-1), rotation=rotation)

    @torch.no_grad()
    def output(self, x: Tensor, *, weight: RowWeight, activation_bits: int) -> Tensor:
        """The product float32 [M, N] of inputs float32 [M, K], without a bias; integer sums are exact."""
        if weight.rotation:
            x = hadamard_transform(x, block_size=weight.rotation, kind="regular")
        codes, scale = self.input_codes(x, bits=activation_bits)
        sums = codes.double() @ weight.codes.double().t()  # float64 holds every sum of the integers
        return sums.float() * scale * weight.scale

    def input_codes(self, x: Tensor, *, bits: int) -> tuple[Tensor, Tensor]:
        """Codes of inputs float32 [M, K], whole float32 numbers, and their scales float32 [M, 1]."""
        qmax = 2 ** (bits - 1) - 1
        top = x.abs().amax(-1, keepdim=True)
        if self.arithmetic == "division":
            scale = top.clamp(min=MIN_SPAN) / x.new_full((), qmax)
            return (x / scale).round().clamp(-qmax, qmax), scale
        scale = (top / x.new_full((), qmax)).clamp(min=LOWEST_SCALE)
        return (x * scale.reciprocal()).round().clamp(-qmax, qmax), scale

    def _bits_again(self, layer: PackedLinear) -> int:
        return layer.profile.weight.bits if self.own_width else self.weight_bits

    def _weight_reasons(self, layer: PackedLinear) -> list[str]:
        profile = layer.profile
        grid, kind = profile.weight, profile.rotation_kind
        turned = f"weight rotated by {kind} blocks of {profile.rotation}" if profile.rotation else "weight not rotated"
        fits = profile.rotation in self.rotations and (not profile.rotation or kind == "regular")
        found = {
            f"weight of {grid.bits} bits": grid.bits > self.weight_bits,
            "weight with a zero point": not grid.symmetric,
            f"weight with a scale for every {grid.group_size} columns": grid.granularity != "per_channel",
            f"weight scales in {grid.scale_dtype}, not {self.scale_dtype}": self.scale_dtype
            not in ("float32", grid.scale_dtype),
            turned: not fits,
            **extra_reasons(layer),
        }
        return [reason for reason, is_so in found.items() if is_so]

    def _input_reasons(self, layer: PackedLinear) -> list[str]:
        grid = layer.profile.activation
        found = {
            f"inputs of {grid.bits} bits": grid.bits not in self.activation_bits,
            "inputs with a zero point": not grid.symmetric,
            f"inputs with a scale for every {grid.group_size} columns": grid.granularity == "per_group",
            "inputs with static ranges": layer.form.static,
            "ranges of inputs cut by learned factors": not layer.form.static and grid.clip,
            _ARITHMETIC_REASONS[self.arithmetic]: grid.arithmetic != self.arithmetic,
            f"scales of inputs in {grid.scale_dtype}, not float32": grid.scale_dtype != "float32",
        }
        return [reason for reason, is_so in found.items() if is_so]


def extra_reasons(layer: PackedLinear) -> dict[str, bool]:
    """Additions that a layer may have besides grids and rotation, and whether it does."""
    return {
        "inputs multiplied by a smoothing vector": layer.form.input_scale,
        "a low-rank branch": layer.form.branch_rank > 0,
        "widths that change while sampling": layer.form.width_table is not None,
    }
