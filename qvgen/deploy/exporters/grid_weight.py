"""The weight of targets that dequantize it and leave inputs as they are: codes, scales and zero points of any uniform grid.

    w = scale (q - zero_point), per row or per group of columns

Codes are the layer's own where it has neither rotation, smoothing nor branch; else its plain weight is quantized again, with
as many bits and columns to a group.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qvgen.deploy.exporters.base import Fit
from qvgen.deploy.exporters.plain_weight import plain_weight, weight_changes
from qvgen.layers.packed_linear import PackedLinear
from qvgen.quant.affine import quantize
from qvgen.quant.grid import Grid, ZeroPointKind
from qvgen.quant.ranges import search_qparams


@dataclass(frozen=True, kw_only=True)
class GridWeight:
    """A weight on its grid.

    Attributes:
        codes: int8 (symmetric) or uint8 [N, K].
        scale: float32 [N, G].
        zero_point: float32 [N, G], zeros for a symmetric grid.
        grid: The grid.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    grid: Grid


def grid_weight_fit(layer: PackedLinear, *, zero_points: Collection[ZeroPointKind]) -> Fit:
    """Whether the layer's own codes are carried by a target with these kinds of zero points."""
    bits = layer.profile.weight.bits
    reasons = tuple(_reasons(layer, zero_points))
    return Fit(weight=reasons, inputs=(), runs_as=f"w{bits}", quantizes_inputs=False)


@torch.no_grad()
def grid_weight(layer: PackedLinear, *, zero_points: Collection[ZeroPointKind]) -> GridWeight:
    """The layer's own codes, or those of its plain weight."""
    grid, rows = layer.profile.weight, layer.out_features
    if not _reasons(layer, zero_points):
        scale = layer.weight_scale.detach().reshape(rows, -1)
        zero_point = layer.weight_zero_point
        zeros = torch.zeros_like(scale) if zero_point is None else zero_point.float().reshape(rows, -1)
        return GridWeight(codes=layer.integer_codes(), scale=scale, zero_point=zeros, grid=grid)
    if grid.zero_point not in zero_points:
        grid = replace(grid, zero_point="integer")
    weight = plain_weight(layer)
    scale, zeros = search_qparams(weight, grid=grid)
    codes = quantize(weight, scale=scale, zero_point=zeros, grid=grid)
    return GridWeight(codes=codes, scale=scale.reshape(rows, -1), zero_point=zeros.reshape(rows, -1), grid=grid)


def _reasons(layer: PackedLinear, zero_points: Collection[ZeroPointKind]) -> list[str]:
    profile = layer.profile
    found = {
        f"weight with a zero point of the kind {profile.weight.zero_point}": profile.weight.zero_point
        not in zero_points,
        f"weight rotated by {profile.rotation_kind} blocks of {profile.rotation}": profile.rotation != 0,
        "inputs multiplied by a smoothing vector": layer.form.input_scale,
        "a low-rank branch": layer.form.branch_rank > 0,
        "weights whose widths change while sampling": weight_changes(layer),
    }
    return [reason for reason, is_so in found.items() if is_so]
