"""One drawing of a report: matplotlib -> inline SVG that takes its colours from the page.

The drawings carry no colours and no fonts of their own: placeholders are replaced by the page's CSS variables, so that
one drawing is readable on a light and on a dark page. The SVG is the same for the same numbers (salted ids, no date).
"""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_PLACEHOLDERS: dict[str, str] = {
    "#0a0b01": "var(--series-1)",
    "#0a0b02": "var(--series-2)",
    "#0a0b03": "var(--text-soft)",
    "#0a0b04": "var(--line)",
    **{f"#0a0b{index + 4:02x}": f"var(--series-{index})" for index in range(3, 9)},
}
FIRST, SECOND, TEXT, GRID, *_MORE = _PLACEHOLDERS
SERIES: tuple[str, ...] = (FIRST, SECOND, *_MORE)
"""Colours of curves that are drawn over each other."""

_FONT_POINTS = 9.0
_CHARACTER_EMS = 0.62
"""Width of a number's characters in the sans-serif fonts that pages have, rounded up."""
_LINE_POINTS, _GAP_POINTS = 14.0, 6.0
"""Height of a line of text, and what is left free around it."""

_RC: dict[str, object] = {
    "svg.fonttype": "none",  # real text in the page's font
    "font.size": _FONT_POINTS,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GRID,
    "axes.labelcolor": TEXT,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "text.color": TEXT,
    "xtick.color": TEXT,
    "ytick.color": TEXT,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
    "legend.frameon": False,
}

Series = tuple[np.ndarray, np.ndarray]
"""(steps int64 [n], values float64 [n]), n >= 1, steps increasing."""


@dataclass(frozen=True, kw_only=True)
class Chart:
    """One drawing.

    Attributes:
        title: what is drawn, with its unit.
        note: how to read it; may be empty.
        svg: a whole <svg> element without fixed size, to be put into a page as it is.
    """

    title: str
    note: str
    svg: str


class Canvas:
    """One pair of axes in the page's style; leaves matplotlib's global state as it was.

    Args:
        title: what is drawn, with its unit.
        last_step: where the axis of steps ends; one for all drawings of a run, so that they can be read across.
    """

    def __init__(self, title: str, *, last_step: int) -> None:
        import matplotlib
        from matplotlib.figure import Figure  # without pyplot: no backend is chosen, no window is kept

        self.title = title
        self._last_step = last_step
        self._context = matplotlib.rc_context({**_RC, "svg.hashsalt": title})
        self._figure_class = Figure

    def __enter__(self) -> Canvas:
        from matplotlib.ticker import MaxNLocator

        self._context.__enter__()
        self.figure = self._figure_class(figsize=(5.2, 2.6))
        self.axes = self.figure.add_subplot()
        self.axes.set_xlabel("step")
        self.axes.set_xlim(0, max(1, self._last_step))
        self.axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
        return self

    def __exit__(self, *error: object) -> None:
        self._context.__exit__(*error)

    def chart(self, note: str) -> Chart:
        """Return the drawing as inline SVG."""
        _leave_margins(self.figure)
        buffer = io.StringIO()
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        self.figure.savefig(buffer, format="svg", transparent=True, metadata=metadata)
        return Chart(title=self.title, note=note, svg=_inline(buffer.getvalue()))


def _leave_margins(figure: Figure) -> None:
    """Leave room beside the axes for their numbers and labels, and place the labels.

    matplotlib's constrained layout draws everything once more to measure it, and its own placing of labels measures again:
    half of a drawing's time. The text is set in the page's font, whose size matplotlib does not know.
    """
    width, height = 72.0 * figure.get_size_inches()
    below = 2 * _LINE_POINTS + _GAP_POINTS
    above = _LINE_POINTS if any(axes.yaxis.get_offset_text().get_text() for axes in figure.axes) else _GAP_POINTS
    margin = {"left": _GAP_POINTS, "right": _GAP_POINTS}
    for axes in figure.axes:
        numbers = axes.yaxis.get_major_formatter().format_ticks(axes.yaxis.get_majorticklocs())
        longest = max((len(number) for number in numbers), default=0)
        needed = 2 * _GAP_POINTS + _CHARACTER_EMS * _FONT_POINTS * longest
        margin[axes.yaxis.get_ticks_position()] = needed + (_LINE_POINTS if axes.get_ylabel() else 0.0)
    sides = {"left": margin["left"] / width, "right": 1 - margin["right"] / width}
    figure.subplots_adjust(**sides, bottom=below / height, top=1 - above / height)
    for axes in figure.axes:
        axes.xaxis.set_label_coords(0.5, _LINE_POINTS / height, transform=figure.transFigure)
        at = _LINE_POINTS / width if axes.yaxis.get_ticks_position() == "left" else 1 - _LINE_POINTS / width
        axes.yaxis.set_label_coords(at, 0.5, transform=figure.transFigure)


def _inline(document: str) -> str:
    """Turn matplotlib's SVG document into an element of a page: no prologue, no size, no ids but those referred to."""
    svg = document[document.index("<svg") :]
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r" font-family: [^;\"]*;", "", svg)
    # A <style> inside an inline drawing would hold for the whole page.
    svg = re.sub(r"<defs>\s*<style[^>]*>.*?</style>\s*</defs>", "", svg, count=1, flags=re.DOTALL)
    for placeholder, variable in _PLACEHOLDERS.items():
        svg = svg.replace(placeholder, variable)
    return svg.strip()


def use_log_axis(axes: Axes) -> None:
    """Make the vertical axis logarithmic, with readable numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    # Within one decade a power of ten alone would leave the axis without a number.
    steps = (1.0, 2.0, 5.0) if high / low < 100 else (1.0,)
    axes.yaxis.set_major_locator(LogLocator(base=10.0, subs=steps))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
