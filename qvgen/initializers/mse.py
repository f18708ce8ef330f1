"""Range search per row: the start that the QVGen release uses. The search is :mod:`qvgen.quant.ranges`."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from qvgen.initializers.base import LayerStatistics, Need
from qvgen.layers.fake_quant_linear import FakeQuantLinear
from qvgen.quant.ranges import search_qparams


class MeanSquaredError:
    """The range with the least rounding error |.|^2.4 of each row or group. Data-free."""

    needs: frozenset[Need] = frozenset()
    concurrent: ClassVar[bool] = True

    def initialize_(self, layer: FakeQuantLinear, *, statistics: LayerStatistics | None) -> Tensor:
        """See :class:`qvgen.initializers.base.Initializer`."""
        del statistics
        scale, zero_point = search_qparams(layer.weight.detach(), grid=layer.profile.weight)
        layer.weight_quantizer.start_from_(scale, zero_point)
        return layer.weight.detach()
