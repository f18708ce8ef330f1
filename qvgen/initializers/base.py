"""What every PTQ method is to the rest: something that sets a fake-quantized layer up, from statistics if it needs any."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from jaxtyping import Float
from torch import Tensor

from qvgen.layers.fake_quant_linear import FakeQuantLinear

Need = Literal["abs_max", "second_moment", "inputs"]
"""A kind of statistics; see :class:`LayerStatistics`."""


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerStatistics:
    """What calibration saw of one layer's inputs x [.., K], in the model's own coordinates.

    Attributes:
        abs_max: float32 [num_bands, K], largest |x| of each channel by noise band; 0 in bands that were not seen.
        second_moment: float32 [K, K], mean of x^T x over rows; None if it was not asked for.
        inputs: float32 [n, K], some of the rows; None if they were not asked for.
        num_rows: rows that ``second_moment`` is a mean of.
    """

    abs_max: Float[Tensor, "bands K"]
    second_moment: Float[Tensor, "K K"] | None
    inputs: Float[Tensor, "n K"] | None
    num_rows: int


class Initializer(Protocol):
    """Protocol of the leaves of this package; built from ``conf/init/*.yaml`` by ``_target_``.

    Attributes:
        needs: Kinds of statistics; empty for a data-free method, for which nothing is sampled.
    """

    needs: frozenset[Need]

    def initialize_(self, layer: FakeQuantLinear, *, statistics: LayerStatistics | None) -> Tensor:
        """Set a layer up, in place: its coordinates (rotation, smoothing), codes, scales and zero points.

        Args:
            layer: Its master weight [N, K] is the full-precision one (rotated if the profile rotates).
            statistics: Of the layer, with what ``needs`` says; None for a data-free method.

        Returns:
            float32 [N, K], the full-precision weight in the layer's coordinates as they are now: what Q(W) + Phi shall be.
        """


def require(statistics: LayerStatistics | None, need: Need) -> LayerStatistics:
    """The statistics, which hold what is needed; anything else is a mistake of the caller."""
    assert statistics is not None, f"{need} was asked for and nothing was collected"
    assert getattr(statistics, need) is not None, f"{need} was asked for and not collected"
    return statistics
