"""Lines over the steps of a run, as SVG that takes its colours from the page.

    -- name   -- name           the legend, where a line has a name
    number +-----------------+ number
           |      lines      |        a left and perhaps a right axis, the left one linear or logarithmic
    number +-----------------+ number
           0      step      last

The drawing is written as SVG directly: matplotlib takes 0.05 to 0.1 s for each, as long as a step of a small model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

import numpy as np

from qvgen.evaluation.report.canvas import GRID, TEXT, Chart, in_page_colors
from qvgen.evaluation.report.line_axis import Axis, Line, Scale, linear_ticks

_WIDTH, _HEIGHT, _FONT, _CHARACTER = 374.4, 187.2, 9.0, 5.6
"""The drawing's units: the whole, and the height and the largest mean width of letters."""
_LINE, _GAP, _SAMPLE = 14.0, 6.0, 16.0
"""Height of a line of text, what is left free around it, and the piece of line before a name."""
_MOST_POINTS, _COLUMNS = 1500, 600
"""A longer curve is drawn by its smallest and largest value in each of so many columns."""
_MOST_STEPS = 8
"""Numbers that the axis of steps has at most."""


@dataclass(frozen=True, kw_only=True)
class _Frame:
    """Where the axes lie in the drawing, and which step is at their right end."""

    left: float
    right: float
    top: float
    bottom: float
    last: int

    def x(self, steps: np.ndarray) -> np.ndarray:
        return self.left + (self.right - self.left) * steps / self.last

    def y(self, places: np.ndarray) -> np.ndarray:
        return self.bottom - (self.bottom - self.top) * places


def draw_lines(
    title: str, note: str, *, last_step: int, left: Axis, right: Axis | None = None, mark: int | None = None
) -> Chart:
    """Draw curves over the steps of a run.

    Args:
        title: What is drawn, with its unit.
        note: How to read it; may be empty.
        last_step: Where the axis of steps ends; one for all drawings of a run, so that they can be read across.
        left: The axis on the left, whose numbers have lines across the drawing.
        right: A second one on the right; None for none.
        mark: A step that a dashed vertical line marks; None for none.
    """
    sides = [side for side in (left, right) if side is not None]
    scales = [Scale(side) for side in sides]
    legend = _legend_rows([line for side in sides for line in side.lines if line.name])
    room = [_room(side, scale) for side, scale in zip(sides, scales, strict=True)]
    frame = _Frame(
        left=room[0],
        right=_WIDTH - (room[1] if right is not None else _GAP),
        top=_GAP + _LINE * len(legend),
        bottom=_HEIGHT - 2 * _LINE - _GAP,
        last=max(1, last_step),
    )
    parts = [*_axis_of_steps(frame), *_grid(frame, scales[0])]
    for place, (side, scale) in enumerate(zip(sides, scales, strict=True)):
        parts += [*_numbers(frame, side, scale, on_right=place == 1), *_levels(frame, side, scale)]
        for line in side.lines:
            parts += _curve(frame, scale, line)
    if mark is not None:
        at = float(frame.x(np.array(mark)))
        parts.append(_path(f"M{at:.1f} {frame.bottom:.1f}V{frame.top:.1f}", color=TEXT, width=1.0, dashes="3 3"))
    parts += _legend(legend, left=frame.left)
    box = f'viewBox="0 0 {_WIDTH:g} {_HEIGHT:g}" font-size="{_FONT:g}"'
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" {box}>{"".join(parts)}</svg>'
    return Chart(title=title, note=note, svg=in_page_colors(svg))


def _room(side: Axis, scale: Scale) -> float:
    """Units beside the axes for an axis's numbers and title."""
    longest = max((len(name) for _, name in scale.numbers), default=0)
    return 2 * _GAP + _CHARACTER * longest + (_LINE if side.title else 0.0)


def _axis_of_steps(frame: _Frame) -> Iterator[str]:
    yield _path(f"M{frame.left:.1f} {frame.top:.1f}V{frame.bottom:.1f}H{frame.right:.1f}", color=GRID, width=0.8)
    steps = linear_ticks(0, frame.last, most=_MOST_STEPS, whole=True)
    for at, step in zip(frame.x(np.array(steps)), steps, strict=True):
        yield _text(f"{step:.0f}", x=at, y=frame.bottom + _LINE - 2)
    yield _text("step", x=(frame.left + frame.right) / 2, y=_HEIGHT - _GAP)


def _grid(frame: _Frame, scale: Scale) -> Iterator[str]:
    for place, _ in scale.numbers:
        at = float(frame.y(np.array(place)))
        yield _path(f"M{frame.left:.1f} {at:.1f}H{frame.right:.1f}", color=GRID, width=0.6)


def _numbers(frame: _Frame, side: Axis, scale: Scale, *, on_right: bool) -> Iterator[str]:
    edge, anchor = (frame.right + _GAP, "start") if on_right else (frame.left - _GAP, "end")
    for place, name in scale.numbers:
        yield _text(name, x=edge, y=float(frame.y(np.array(place))) + 0.35 * _FONT, anchor=anchor)
    if side.title:
        x, y = (_WIDTH - _GAP if on_right else _LINE - 2), (frame.top + frame.bottom) / 2
        yield _text(side.title, x=x, y=y, color=side.color, turned=True)


def _levels(frame: _Frame, side: Axis, scale: Scale) -> Iterator[str]:
    for value, color in side.levels:
        at = float(frame.y(scale.places(np.array(value))))
        if math.isfinite(at):
            yield _path(f"M{frame.left:.1f} {at:.1f}H{frame.right:.1f}", color=color, width=1.2, dashes="4.4 1.9")


def _curve(frame: _Frame, scale: Scale, line: Line) -> Iterator[str]:
    steps, values = (np.asarray(part) for part in line.points)
    kept = _seen(steps, scale.usable(values.astype(np.float64)))
    xs, ys = frame.x(steps[kept]), frame.y(scale.places(values[kept]))
    words, begun, height = [], False, 0.0
    for x, y in zip(xs.tolist(), ys.tolist(), strict=True):
        if not math.isfinite(y):
            begun = False
        elif not begun:
            words.append(f"M{x:.1f} {y:.1f}")
            begun = True
        else:
            words.append(f"H{x:.1f}V{y:.1f}" if line.stairs and y != height else f"L{x:.1f} {y:.1f}")
        height = y
    if words:
        yield _path("".join(words), color=line.color, width=line.width, opacity=line.opacity, dashes=line.dashes)
    if line.dots:
        shown = [(x, y) for x, y in zip(xs.tolist(), ys.tolist(), strict=True) if math.isfinite(y)]
        dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="1.6"/>' for x, y in shown)
        yield f'<g style="fill: {line.color}">{dots}</g>'


def _seen(steps: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Indices of the points that a drawing can show: the smallest and the largest of those that share a column."""
    if len(steps) <= _MOST_POINTS:
        return np.arange(len(steps))
    columns = (steps - steps[0]) * _COLUMNS // max(1, int(steps[-1] - steps[0]))
    begins = [0, *(np.flatnonzero(np.diff(columns)) + 1).tolist(), len(steps)]
    kept: set[int] = set()
    for first, end in pairwise(begins):
        part = values[first:end]
        finite = np.isfinite(part)
        least, most = np.where(finite, part, np.inf), np.where(finite, part, -np.inf)
        kept |= {first + int(least.argmin()), first + int(most.argmax())}
    return np.array(sorted(kept))


def _legend_rows(lines: Sequence[Line]) -> list[list[Line]]:
    """The named lines in rows that have room; none where a drawing has one."""
    rows: list[list[Line]] = []
    used = _WIDTH
    for line in lines if len(lines) > 1 else ():
        needed = _legend_width(line)
        if used + needed > _WIDTH - 6 * _GAP:
            rows.append([])
            used = 0.0
        rows[-1].append(line)
        used += needed
    return rows


def _legend_width(line: Line) -> float:
    return _SAMPLE + 3 * _GAP + 0.85 * _CHARACTER * len(line.name)


def _legend(rows: Sequence[Sequence[Line]], *, left: float) -> Iterator[str]:
    for row, lines in enumerate(rows):
        x, y = left, _GAP + _LINE * (row + 0.5)
        for line in lines:
            yield _path(f"M{x:.1f} {y:.1f}h{_SAMPLE:g}", color=line.color, width=1.8, dashes=line.dashes)
            yield _text(line.name, x=x + _SAMPLE + _GAP, y=y + 0.35 * _FONT, anchor="start")
            x += _legend_width(line)


def _path(words: str, *, color: str, width: float, opacity: float = 1.0, dashes: str = "") -> str:
    style = f"fill: none; stroke: {color}; stroke-width: {width:g}"
    style += f"; stroke-opacity: {opacity:g}" if opacity < 1 else ""
    style += f"; stroke-dasharray: {dashes}" if dashes else ""
    return f'<path d="{words}" style="{style}"/>'


def _text(text: str, *, x: float, y: float, anchor: str = "middle", color: str = TEXT, turned: bool = False) -> str:
    turn = f' transform="rotate(-90 {x:.1f} {y:.1f})"' if turned else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" style="fill: {color}"{turn}>{escape(text)}</text>'
