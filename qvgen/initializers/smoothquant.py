"""SmoothQuant (arXiv 2211.10438): the input's outlier channels are divided down, the weight's columns multiplied up.

X' = X m, W' = W / m, m_j = w_j^(1-alpha) / a_j^alpha (:mod:`qvgen.quant.smoothing`), a_j the largest |X_j| over all noise
bands, as one m serves all sampling steps. Then minimum and maximum of each row of W': its largest columns are those that
the loudest inputs meet, and a range search would clip just them (measured, docs/log.md). Where the model's family allows
it m is folded into what stands before the layer (:mod:`qvgen.initializers.smoothing`), one m for all layers that read the
same input; elsewhere it stays an explicit multiplication before the quantization of the input.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

from torch import Tensor

from qvgen.config.schema.value_range import check_ranges
from qvgen.initializers.base import LayerStatistics, Need, require
from qvgen.initializers.smoothing import chosen_scale
from qvgen.layers.fake_quant_linear import FakeQuantLinear
from qvgen.quant.affine import choose_qparams
from qvgen.quant.runtime import Addition
from qvgen.quant.smoothing import ALPHA


@dataclass(frozen=True, kw_only=True)
class SmoothQuant:
    """Smoothing, then round to nearest.

    Attributes:
        alpha: Share of the input's range that moves into the weight; None: for every layer the value with the least
            error of its output on a sample of its inputs is searched, no smoothing among the candidates.
        fold_smoothing: True folds the smoothing vector m into what stands before a layer (norms, modulations, values)
            where the model allows it; False multiplies by it everywhere.
        compared_rotations: `qvgen benchmark` also measures it with layers that are rotated by so many columns.
    """

    alpha: Annotated[float | None, ALPHA]
    fold_smoothing: bool

    compared_rotations: ClassVar[tuple[int, ...]] = (16,)
    concurrent: ClassVar[bool] = True
    additions: ClassVar[frozenset[Addition]] = frozenset({"smoothing"})

    def __post_init__(self) -> None:
        check_ranges(self, section="init")

    @property
    def needs(self) -> frozenset[Need]:
        """The maxima of the channels, and a sample of inputs where ``alpha`` is searched."""
        return frozenset({"abs_max"}) if self.alpha is not None else frozenset({"abs_max", "inputs"})

    def input_scale(self, layers: Sequence[FakeQuantLinear], *, statistics: LayerStatistics) -> Tensor:
        """See :class:`qvgen.initializers.base.Smoothing`: w_j and the error of the search are those of all layers' rows."""
        return chosen_scale(layers, statistics=statistics, alpha=self.alpha)

    def initialize_(self, layer: FakeQuantLinear, *, statistics: LayerStatistics | None) -> Tensor:
        """See :class:`qvgen.initializers.base.Initializer`."""
        statistics = require(statistics, "abs_max")
        if not statistics.smoothed:
            layer.move_(profile=layer.profile, input_scale=self.input_scale([layer], statistics=statistics))
        scale, zero_point = choose_qparams(layer.weight.detach(), grid=layer.profile.weight)
        layer.weight_quantizer.start_from_(scale, zero_point)
        return layer.weight.detach()
