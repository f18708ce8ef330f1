"""GPTQ (arXiv 2210.17323): columns are rounded one after another, later ones make up for the error of earlier ones.

The grid is the refined one of :mod:`qvgen.quant.bgr` (better than the range search's in every case measured,
docs/log.md); the codes are :func:`qvgen.quant.gptq.gptq_round`'s under the second moment of the layer's inputs over all
noise bands. The master weight becomes the rounded one, so that its codes are GPTQ's; what Phi starts from is the distance
to the full-precision weight. On a rotated profile weight and second moment are rotated alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor

from qvgen.config.schema.value_range import Range, check_ranges
from qvgen.initializers.base import LayerStatistics, Need, require
from qvgen.layers.fake_quant_linear import FakeQuantLinear
from qvgen.layers.fake_quant_product import to_grid_input
from qvgen.quant.affine import dequantize
from qvgen.quant.bgr import refine_grid
from qvgen.quant.gptq import gptq_round


@dataclass(frozen=True, kw_only=True)
class Gptq:
    """Second-order rounding.

    Attributes:
        damping: Share of the second moment's mean diagonal that is added to its diagonal before it is inverted.
        order: Order in which columns are rounded: those with the largest inputs first (``activation``), or as they stand.
        compared_rotations: `qvgen benchmark` also measures it with layers that are rotated by so many columns.
    """

    damping: Annotated[float, Range("> 0", write="0.01")]
    order: Literal["activation", "natural"]

    needs: frozenset[Need] = frozenset({"second_moment"})
    compared_rotations: ClassVar[tuple[int, ...]] = (16,)
    concurrent: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_ranges(self, section="init")
        if self.order not in ("activation", "natural"):
            raise ValueError(f"init.order={self.order} is unknown; use activation or natural")

    @torch.no_grad()
    def initialize_(self, layer: FakeQuantLinear, *, statistics: LayerStatistics | None) -> Tensor:
        """See :class:`qvgen.initializers.base.Initializer`."""
        moment = require(statistics, "second_moment").second_moment
        assert moment is not None
        target = layer.weight.detach().clone()
        moment = to_layer_coordinates(moment.to(target.device), layer)
        grid = layer.profile.weight
        refined = refine_grid(target, grid=grid)
        layer.weight_quantizer.start_from_(refined.scale, refined.zero_point)
        scale, zero_point = layer.weight_quantizer.qparams()
        codes = gptq_round(
            target, moment, scale=scale, zero_point=zero_point, grid=grid, damping=self.damping, order=self.order
        )
        layer.weight.copy_(dequantize(codes, scale=scale, zero_point=zero_point, grid=grid))
        return target


def to_layer_coordinates(moment: Tensor, layer: FakeQuantLinear) -> Tensor:
    """The second moment [K, K] of the inputs as the layer quantizes them: rotated and smoothed from both sides."""
    for _ in range(2):
        moment = to_grid_input(moment, layer.input_scale, profile=layer.profile).mT
    return moment.contiguous()
