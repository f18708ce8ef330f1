"""Numbers as colours: one of all layers over the steps of a run, layers from top to bottom, steps from left to right.

    names  +-----------------+  largest
           | a pixel of a    |  colour bar
           | PNG each        |
           +-----------------+  smallest
             steps

The drawing is written as SVG directly: matplotlib measures every name several times, which took .2 s for each picture.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape

import numpy as np

from qvgen.evaluation.layer_history import LayerHistory
from qvgen.evaluation.report.canvas import Chart

PICTURES = {
    "weight_sqnr_db": "Weight SQNR in dB, by layer",
    "clip_low": "Factor on the minimum of inputs, by layer",
    "clip_high": "Factor on the maximum of inputs, by layer",
    "phi_sigma_max": "Largest singular value of Phi, by layer",
}
"""Numbers of the layers that are drawn over the steps of a run, and their titles."""

_MAX_NAMES, _NUM_STEPS = 48, 6
"""Names of layers and numbers of steps that have room; of more each so-manyth one is named."""

_WIDTH, _ROW, _FONT, _CHARACTER, _GAP, _BAR = 560.0, 12.0, 9.0, 5.2, 6.0, 10.0
"""Sizes in the drawing's units: the whole, a named row, letters and how wide they are at most, gaps, the colour bar."""


def draw_layers(histories: Mapping[str, LayerHistory]) -> dict[str, Chart]:
    """Draw the numbers of :data:`PICTURES` that a run has; column -> its picture."""
    return {name: draw_heat_map(histories[name], title=title) for name, title in PICTURES.items() if name in histories}


def draw_heat_map(history: LayerHistory, *, title: str) -> Chart:
    """Draw a number of all layers.

    Args:
        history: The number; what is not finite stays empty.
        title: What is drawn, with its unit.
    """
    names = [_short(name, history.layers) for name in history.layers]
    every = -(-len(names) // _MAX_NAMES)
    steps = range(0, len(history.steps), -(-len(history.steps) // _NUM_STEPS))
    rows = {place: names[place] for place in range(0, len(names), every)}
    columns = [(place + 0.5, str(history.steps[place])) for place in steps]
    svg = draw_matrix(history.values, rows=rows, columns=columns, below="step")
    note = "" if every == 1 else f"One in {every} of {len(names)} layers is named."
    return Chart(title=title, note=note, svg=svg)


def draw_matrix(
    values: np.ndarray, *, rows: Mapping[int, str], columns: Sequence[tuple[float, str]], below: str
) -> str:
    """Draw numbers [H, W] as colours from the smallest to the largest, as SVG.

    Args:
        values: The numbers, the first row on top; what is not finite stays empty.
        rows: Index -> name of rows. Where some have none, the height is that of 48 names at most.
        columns: Places on the horizontal axis, from 0 to W, and what stands below them.
        below: What stands below all of these.
    """
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    left = _CHARACTER * max(map(len, rows.values())) + _GAP
    right = _WIDTH - 2 * _GAP - _BAR - _CHARACTER * max(len(f"{value:.3g}") for value in (low, high))
    height = _ROW * (len(values) if len(rows) == len(values) else min(len(values), _MAX_NAMES))
    bar = np.linspace(high, low, 64)[:, None]
    parts = [
        _image(_colors(values, low, high), x=left, y=_GAP, width=right - left, height=height),
        _image(_colors(bar, low, high), x=right + _GAP, y=_GAP, width=_BAR, height=height),
        _text(f"{high:.3g}", x=right + 2 * _GAP + _BAR, y=_GAP + _FONT),
        _text(f"{low:.3g}", x=right + 2 * _GAP + _BAR, y=_GAP + height),
    ]
    row = height / len(values)
    for place, name in rows.items():
        parts.append(_text(name, x=left - _GAP, y=_GAP + row * (place + 0.5) + 0.35 * _FONT, anchor="end"))
    for at, text in columns:
        x = left + (right - left) * at / values.shape[1]
        parts.append(_text(text, x=x, y=_GAP + height + 1.3 * _FONT, anchor="middle"))
    parts.append(_text(below, x=(left + right) / 2, y=_GAP + height + 2.7 * _FONT, anchor="middle"))
    box = f"0 0 {_WIDTH:g} {2 * _GAP + height + 3 * _FONT:g}"
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{box}" font-size="{_FONT:g}">{"".join(parts)}</svg>'


def _colors(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Colours uint8 [H, W, 4] of numbers [H, W]; clear where a number is not finite."""
    import matplotlib

    share = (values - low) / (high - low) if high > low else np.where(np.isfinite(values), 0.5, values)
    colors: np.ndarray = matplotlib.colormaps["viridis"](np.ma.masked_invalid(share), bytes=True)
    return colors


def _image(colors: np.ndarray, *, x: float, y: float, width: float, height: float) -> str:
    """Colours [H, W, 4] as an image of so many pixels, enlarged without blurring."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(colors).save(file, format="PNG")
    data = base64.b64encode(file.getvalue()).decode()
    place = f'x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"'
    style = 'preserveAspectRatio="none" style="image-rendering: pixelated"'
    return f'<image {place} {style} href="data:image/png;base64,{data}"/>'


def _text(text: str, *, x: float, y: float, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="var(--text-soft)">{escape(text)}</text>'


def _short(name: str, names: tuple[str, ...]) -> str:
    """A layer's name without what all of them begin with, up to a point."""
    first, last = min(names), max(names)
    same = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    return name[name.rfind(".", 0, same) + 1 :]
