"""A PTQ method as the rest of the library sees it: it sets a fake-quantized layer up, from statistics if it needs any."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol, Self, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from qvgen.layers.fake_quant_linear import FakeQuantLinear

Need = Literal["abs_max", "second_moment", "inputs", "ranges"]
"""A kind of statistics; see :class:`LayerStatistics`."""


@dataclass(frozen=True, kw_only=True, eq=False)
class StepRanges:
    """Smallest and largest input of each channel at each step of the sampler, conditional and unconditional calls together.

    Attributes:
        timesteps: Timesteps of the sampler's steps, rising.
        low: float32 [num_steps, K].
        high: float32 [num_steps, K].
    """

    timesteps: tuple[float, ...]
    low: Float[Tensor, "steps K"]
    high: Float[Tensor, "steps K"]

    def scaled(self, factor: Float[Tensor, " K"]) -> Self:
        """The ranges of inputs that are multiplied by ``factor``, whose signs may differ."""
        ends = self.low * factor, self.high * factor
        return replace(self, low=torch.minimum(*ends), high=torch.maximum(*ends))


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerStatistics:
    """Statistics of one layer's inputs x [.., K] that calibration collected, in the model's own coordinates.

    Attributes:
        abs_max: float32 [num_bands, K], largest |x| of each channel by noise band; 0 in bands that were not seen.
        second_moment: float32 [K, K], mean of x^T x over rows; None if it was not asked for.
        inputs: float32 [n, K], some of the rows; None if they were not asked for.
        num_rows: rows that ``second_moment`` is a mean of.
        ranges: Ranges of each channel at each sampling step; None if they were not asked for.
        smoothed: a smoothing vector was folded into what stands before the layer: it needs none of its own.
    """

    abs_max: Float[Tensor, "bands K"]
    second_moment: Float[Tensor, "K K"] | None
    inputs: Float[Tensor, "n K"] | None
    num_rows: int
    ranges: StepRanges | None = None
    smoothed: bool = False

    def folded(self, input_scale: Float[Tensor, " K"]) -> Self:
        """The statistics of inputs x m, as they are once m is folded into what makes x."""
        m = input_scale.to(self.abs_max)
        return replace(
            self,
            abs_max=self.abs_max * m.abs(),
            second_moment=None if self.second_moment is None else self.second_moment * m * m[:, None],
            inputs=None if self.inputs is None else self.inputs * m,
            ranges=None if self.ranges is None else self.ranges.scaled(m),
            smoothed=True,
        )


class Initializer(Protocol):
    """Protocol of the leaves of this package; built from ``conf/init/*.yaml`` by ``_target_``.

    Attributes:
        needs: Kinds of statistics; empty for a data-free method, for which nothing is sampled.
        additions: (optional) What it may add to a layer besides codes, scales and zero points, of
            :data:`qvgen.quant.runtime.Addition`. A profile whose runtime lacks one of them refuses the method.
        concurrent: (optional) Whether several layers may be set up at the same time, in threads; without it, one after the
            other.
    """

    needs: frozenset[Need]

    def initialize_(self, layer: FakeQuantLinear, *, statistics: LayerStatistics | None) -> Tensor:
        """Set a layer up, in place: its coordinates (rotation, smoothing), codes, scales and zero points.

        Args:
            layer: Its master weight [N, K] is the full-precision one (rotated if the profile rotates).
            statistics: Statistics of the layer's inputs, those that ``needs`` names; None for a data-free method.

        Returns:
            float32 [N, K], the full-precision weight in the layer's coordinates as they are now: what Q(W) + Phi shall be.
        """


@runtime_checkable
class Smoothing(Initializer, Protocol):
    """A method that multiplies inputs by a vector m before it quantizes them, and weights' columns by 1 / m.

    Attributes:
        fold_smoothing: fold m into what stands before a layer, where the model allows it.
    """

    fold_smoothing: bool

    def input_scale(self, layers: Sequence[FakeQuantLinear], *, statistics: LayerStatistics) -> Tensor:
        """One m float32 [K], not 0 anywhere, for layers that read the same input.

        Args:
            layers: In the model's own coordinates, or rotated.
            statistics: Statistics of their common input.
        """


def require(statistics: LayerStatistics | None, need: Need) -> LayerStatistics:
    """The statistics, which hold what is needed; anything else is a mistake of the caller."""
    assert statistics is not None, f"{need} was asked for and nothing was collected"
    assert getattr(statistics, need) is not None, f"{need} was asked for and not collected"
    return statistics
