"""Balancing and rotation of a layer: the numerics of ViDiT-Q (arXiv 2406.02540), which its two methods share.

    m_j = w_j^alpha / a_j^(1-alpha)      a_j: largest |X_j| over all noise bands (the paper: over timesteps)
    X' = (X m D) H, W' = (W / (m D)) H   D: random signs, so that H is a random Hadamard matrix

D is part of the layer's input_scale: one multiplication, which is folded into what stands before the layer where the model's
family allows it (:mod:`qvgen.initializers.smoothing`), where layers that read the same input share m. The weight is rounded
once, from (W / (m D)) H (the released code rounds twice); activations are dynamic per token of each sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from qvgen.config.schema.value_range import check_ranges
from qvgen.initializers.base import LayerStatistics, Need, require
from qvgen.layers.fake_quant_linear import FakeQuantLinear
from qvgen.quant.hadamard import largest_block, random_signs
from qvgen.quant.ranges import search_qparams
from qvgen.quant.runtime import Addition
from qvgen.quant.smoothing import ALPHA, smoothing_scale


@dataclass(frozen=True, kw_only=True)
class BalancedRotation:
    """Balancing, rotation and range search, with the bits that a layer has.

    Attributes:
        alpha: Exponent of the weight's maxima in the balancing (the paper's); it uses 0.56 for W4A8 and 0.75 for W8A8.
        seed: Seed of the rotation's random signs.
        fold_smoothing: True folds the smoothing vector and the signs into what stands before a layer (norms,
            modulations, values) where the model allows it; False multiplies by them everywhere.
    """

    alpha: Annotated[float, ALPHA]
    seed: int
    fold_smoothing: bool

    needs: frozenset[Need] = frozenset({"abs_max"})
    concurrent: ClassVar[bool] = True
    additions: ClassVar[frozenset[Addition]] = frozenset({"rotation", "smoothing"})

    def __post_init__(self) -> None:
        check_ranges(self, section="init")

    def input_scale(self, layers: Sequence[FakeQuantLinear], *, statistics: LayerStatistics) -> Tensor:
        """See :class:`qvgen.initializers.base.Smoothing`."""
        weight = torch.cat([layer.original_weight() for layer in layers])
        largest = require(statistics, "abs_max").abs_max.amax(0).to(weight.device)
        # smoothing_scale's alpha is the share of the input's range that moves into the weight: 1 - the paper's.
        factor = smoothing_scale(largest, weight, alpha=1.0 - self.alpha)
        signs = random_signs(layers[0].in_features, key=f"vidit_q/{self.seed}")
        return factor * signs.to(factor)

    def initialize_(self, layer: FakeQuantLinear, *, statistics: LayerStatistics | None) -> Tensor:
        """See :class:`qvgen.initializers.base.Initializer`."""
        statistics = require(statistics, "abs_max")
        factor = None if statistics.smoothed else self.input_scale([layer], statistics=statistics)
        layer.move_(profile=layer.profile.with_rotation(largest_block(layer.in_features)), input_scale=factor)
        for quantizer in layer.weight_quantizers().values():  # more than one where bits change over sampling
            quantizer.start_from_(*search_qparams(layer.weight.detach(), grid=quantizer.grid))
        return layer.weight.detach()
