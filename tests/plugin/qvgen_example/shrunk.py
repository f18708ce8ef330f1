"""A PTQ method: of a row's whole range and a smaller one, that with the smaller squared error. Data-free."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qvgen.initializers.base import LayerStatistics, Need
from qvgen.layers.fake_quant_linear import FakeQuantLinear
from qvgen.quant.affine import choose_qparams, fake_quantize


@dataclass(frozen=True, kw_only=True)
class Shrunk:
    """Two candidates for each row.

    Attributes:
        share: Of the row's range that the second candidate keeps, in (0, 1].
    """

    share: float

    needs: frozenset[Need] = frozenset()

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"init.share={self.share} is outside (0, 1]; write for example init.share=0.9")

    def initialize_(self, layer: FakeQuantLinear, *, statistics: LayerStatistics | None) -> Tensor:
        """See :class:`qvgen.initializers.base.Initializer`."""
        del statistics
        weight, grid = layer.weight.detach(), layer.profile.weight
        wide, narrow = (choose_qparams(weight * share, grid=grid) for share in (1.0, self.share))
        errors = [
            (fake_quantize(weight, scale=scale, zero_point=zero, grid=grid) - weight).square().sum(1, keepdim=True)
            for scale, zero in (wide, narrow)
        ]
        best = [torch.where(errors[1] < errors[0], second, first) for first, second in zip(wide, narrow, strict=True)]
        layer.weight_quantizer.start_from_(*best)
        return weight
