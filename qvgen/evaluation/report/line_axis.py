"""One vertical axis of a drawing of lines: its curves, the range of their values, and the numbers beside it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qvgen.evaluation.report.canvas import TEXT, Series

_MOST_NUMBERS, _MOST_DECADES = 6, 7
"""Numbers, and powers of ten, that an axis has at most."""
_MARGIN = 0.05
"""Share of the values' range that is left free above and below."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """One curve.

    Attributes:
        points: Steps and values; where a value is not finite, or not positive on a logarithmic axis, the line is broken.
        color: A colour of :mod:`qvgen.evaluation.report.canvas`.
        width: In the drawing's units, which are about pixels.
        opacity: 0 to 1.
        dots: Whether each point has a dot.
        stairs: Whether a value holds until the next step, in place of a straight line to it.
        dashes: Lengths of dashes and of gaps in turn, as SVG has them; "" for a line without gaps.
        name: What the legend says of it; "" for nothing.
    """

    points: Series
    color: str
    width: float = 1.8
    opacity: float = 1.0
    dots: bool = False
    stairs: bool = False
    dashes: str = ""
    name: str = ""


@dataclass(frozen=True, kw_only=True)
class Axis:
    """The vertical axis on one side, with its lines.

    Attributes:
        lines: The curves, drawn in this order.
        log: Whether the axis is logarithmic.
        low: Where it begins; None: a little below the smallest value.
        high: Where it ends; None: a little above the largest value.
        title: What stands beside it; may be empty.
        color: The colour of its title.
        levels: Values that a dashed line marks, each with its colour.
    """

    lines: Sequence[Line]
    log: bool = False
    low: float | None = None
    high: float | None = None
    title: str = ""
    color: str = TEXT
    levels: Sequence[tuple[float, str]] = ()


class Scale:
    """From the values of an axis to places from 0 (the bottom) to 1 (the top).

    Args:
        axis: The axis; where no value can be shown, it goes from 0.1 to 1.

    Attributes:
        numbers: Places and texts of the numbers that stand beside the axis; at least one.
    """

    def __init__(self, axis: Axis) -> None:
        self.log = axis.log
        values = np.concatenate([np.asarray(line.points[1], dtype=np.float64) for line in axis.lines])
        values = self.usable(np.concatenate([values, [value for value, _ in axis.levels]]))
        values = values[np.isfinite(values)]
        low, high = (float(values.min()), float(values.max())) if values.size else (0.1, 1.0)
        self.low, self.high = self._bound(axis.low, low), self._bound(axis.high, high)
        if self.high <= self.low:  # one value, in the middle
            half = 0.05 if self.log else 0.05 * abs(self.low) or 0.05
            self.low, self.high = self.low - half, self.high + half
        else:
            free = _MARGIN * (self.high - self.low)
            self.low -= free if axis.low is None else 0.0
            self.high += free if axis.high is None else 0.0
        ticks = log_ticks(10.0**self.low, 10.0**self.high) if self.log else []
        ticks = ticks or linear_ticks(*((10.0**self.low, 10.0**self.high) if self.log else (self.low, self.high)))
        names = [f"{tick:g}" for tick in ticks] if self.log else tick_names(ticks)
        self.numbers = list(zip(map(float, self.places(np.array(ticks))), names, strict=True))

    def _bound(self, given: float | None, found: float) -> float:
        value = found if given is None else given
        return math.log10(value) if self.log else value

    def usable(self, values: np.ndarray) -> np.ndarray:
        """The values that the axis can show, and NaN in place of the others."""
        return np.where(np.isfinite(values) & ((values > 0) | (not self.log)), values, np.nan)

    def places(self, values: np.ndarray) -> np.ndarray:
        """Where values lie: 0 at the bottom, 1 at the top, NaN where the axis can't show one."""
        values = self.usable(values.astype(np.float64))
        return ((np.log10(values) if self.log else values) - self.low) / (self.high - self.low)


def linear_ticks(low: float, high: float, *, most: int = _MOST_NUMBERS, whole: bool = False) -> list[float]:
    """At most so many round numbers between two, or the lower one where floating-point numbers tell no others apart.

    Args:
        low: The smallest number.
        high: The largest number, above it.
        most: How many numbers there are at most.
        whole: Whether they are whole numbers.

    >>> linear_ticks(0.02, 0.91)
    [0.2, 0.4, 0.6, 0.8]
    """
    span = high - low
    if not math.isfinite(span) or span <= 1e-12 * max(abs(low), abs(high)) or span < 1e-290:
        return [low]
    power = 10.0 ** math.floor(math.log10(span / most))
    steps = [part * power for part in (1.0, 2.0, 2.5, 5.0, 10.0, 20.0)]
    steps = [max(1.0, step) if whole else step for step in steps if not whole or step < 1 or step.is_integer()]
    for step in steps:
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        if last - first < most:
            return [float(f"{index * step:.12g}") for index in range(first, last + 1)] or [low]
    return [low]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten between two positive numbers, some where they are many; 1, 2 and 5 times them within two decades.

    >>> log_ticks(0.03, 0.9)
    [0.05, 0.1, 0.2, 0.5]
    """
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    every = 1 + (last - first) // _MOST_DECADES
    parts = (1.0, 2.0, 5.0) if high / low < 100 else (1.0,)
    powers = range(first - first % every, last + 1, every)
    return [tick for power in powers for part in parts if low <= (tick := float(f"{part:g}e{power}")) <= high]


def tick_names(ticks: Sequence[float]) -> list[str]:
    """Numbers as text, all with as many digits as tell them apart.

    >>> tick_names([0.0, 0.25, 0.5])
    ['0.00', '0.25', '0.50']
    """
    largest = max(map(abs, ticks), default=0.0)
    if largest and not 1e-4 <= largest < 1e6:
        return [f"{tick:.3g}" for tick in ticks]
    close = 1e-6 * (largest or 1.0)
    digits = next((n for n in range(9) if all(abs(round(tick, n) - tick) <= close for tick in ticks)), 9)
    return [f"{tick:.{digits}f}" for tick in ticks]
