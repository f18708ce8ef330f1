"""Round to nearest: the range of every row (or group) is its minimum and maximum. The plainest PTQ there is."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from qvgen.initializers.base import LayerStatistics, Need
from qvgen.layers.fake_quant_linear import FakeQuantLinear
from qvgen.quant.affine import choose_qparams


class RoundToNearest:
    """Minimum and maximum of the weight, 0 included. Activations keep their starting clips. Data-free."""

    needs: frozenset[Need] = frozenset()
    concurrent: ClassVar[bool] = True

    def initialize_(self, layer: FakeQuantLinear, *, statistics: LayerStatistics | None) -> Tensor:
        """See :class:`qvgen.initializers.base.Initializer`."""
        del statistics
        scale, zero_point = choose_qparams(layer.weight.detach(), grid=layer.profile.weight)
        layer.weight_quantizer.start_from_(scale, zero_point)
        return layer.weight.detach()
