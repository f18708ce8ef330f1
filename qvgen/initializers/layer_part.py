"""Statistics of one layer's inputs in a part of a calibration, such as one video; parts that follow each other are joined.

    abs_max, ranges    the larger, the wider of both: the same in any order
    sum of x^T x       float32, parts added in their order
    inputs             each row has a random number; the ``MAX_INPUTS`` rows with the smallest ones are kept, in their order

A row is kept or not whatever part it came with, so that the rows are a uniform sample of all, and the same whoever collected
which part. Statistics of several parts have the same bits, in one process or in many, where the parts are the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from qvgen.initializers.base import LayerStatistics, StepRanges

MAX_INPUTS = 512


@dataclass(kw_only=True, eq=False)
class LayerPart:
    """One layer's part, on the CPU.

    Attributes:
        abs_max: float32 [num_bands, K], largest |x| by noise band.
        moment: float32 [K, K], sum of x^T x over rows; None where it was not asked for.
        inputs: float32 [n, K], rows; None where they were not asked for.
        draws: float64 [n], the random number of each row in [0, 1).
        num_rows: Rows that ``moment`` and ``inputs`` are of.
        ranges: Timestep -> smallest and largest input of each channel, float32 [K] each; None where they were not asked for.
    """

    abs_max: Tensor
    moment: Tensor | None
    inputs: Tensor | None
    draws: Tensor | None
    num_rows: int
    ranges: dict[float, tuple[Tensor, Tensor]] | None

    def join_(self, later: LayerPart) -> None:
        """Take in the part that follows."""
        self.abs_max = torch.maximum(self.abs_max, later.abs_max)
        if self.moment is not None:
            self.moment += later.moment
        if self.inputs is not None:
            assert self.draws is not None
            assert later.inputs is not None
            assert later.draws is not None
            draws = torch.cat((self.draws, later.draws))
            kept = kept_rows(draws)
            self.inputs, self.draws = torch.cat((self.inputs, later.inputs))[kept], draws[kept]
        if self.ranges is not None:
            for timestep, ends in (later.ranges or {}).items():
                widen_(self.ranges, timestep, *ends)
        self.num_rows += later.num_rows

    def behind(self, earlier: Self | None) -> Self:
        """This part and those before it (``earlier``, changed in place) as one; itself where there are none."""
        if earlier is None:
            return self
        earlier.join_(self)
        return earlier

    def statistics(self, name: str) -> LayerStatistics:
        """The statistics of the layer's inputs, if this is all of them.

        Raises:
            ValueError: It was never called, or its inputs were not finite.
        """
        if self.num_rows == 0 and not bool(self.abs_max.any()):
            raise ValueError(f"{name} was never called with anything but zeros while calibrating; exclude the layer")
        if not bool(self.abs_max.isfinite().all()):
            raise ValueError(f"{name} had inputs that are not finite while calibrating; run the model in float32")
        ranges = None
        if self.ranges is not None:
            steps = tuple(sorted(self.ranges))
            low, high = (torch.stack([self.ranges[step][side] for step in steps]) for side in (0, 1))
            ranges = StepRanges(timesteps=steps, low=low, high=high)
        return LayerStatistics(
            abs_max=self.abs_max,
            second_moment=None if self.moment is None else self.moment / max(self.num_rows, 1),
            inputs=self.inputs,
            num_rows=self.num_rows,
            ranges=ranges,
        )

    def tensors(self) -> dict[str, Tensor]:
        """All of it, as tensors of a file."""
        found = {"abs_max": self.abs_max, "num_rows": torch.tensor(self.num_rows)}
        given = {"moment": self.moment, "inputs": self.inputs, "draws": self.draws}
        found |= {name: value for name, value in given.items() if value is not None}
        if self.ranges is not None:
            found["timesteps"] = torch.tensor(list(self.ranges), dtype=torch.float64)
            for side, place in (("low", 0), ("high", 1)):
                ends = [ends[place] for ends in self.ranges.values()]
                found[side] = torch.stack(ends) if ends else self.abs_max.new_empty(0, self.abs_max.shape[1])
        return found

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Self:
        """Make a part of the tensors that :meth:`tensors` gave."""
        ranges = None
        if "timesteps" in tensors:
            ends = zip(tensors["low"], tensors["high"], strict=True)
            ranges = dict(zip(tensors["timesteps"].tolist(), ends, strict=True))
        return cls(
            abs_max=tensors["abs_max"],
            moment=tensors.get("moment"),
            inputs=tensors.get("inputs"),
            draws=tensors.get("draws"),
            num_rows=int(tensors["num_rows"]),
            ranges=ranges,
        )


def kept_rows(draws: Tensor) -> Tensor:
    """Which of some rows are kept, in their order: those with the smallest numbers.

    Example:
        >>> kept_rows(torch.linspace(1, 0, MAX_INPUTS + 2, dtype=torch.float64))[:3].tolist()
        [2, 3, 4]
    """
    return draws.argsort(stable=True)[:MAX_INPUTS].sort().values


def widen_(ranges: dict[float, tuple[Tensor, Tensor]], timestep: float, low: Tensor, high: Tensor) -> None:
    """Let the ranges of a timestep include ``low`` and ``high``."""
    if timestep in ranges:
        low, high = torch.minimum(low, ranges[timestep][0]), torch.maximum(high, ranges[timestep][1])
    ranges[timestep] = low, high
