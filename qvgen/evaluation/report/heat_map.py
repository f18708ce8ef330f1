"""One number of all layers over the steps of a run, as colours: layers from top to bottom, steps from left to right."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from qvgen.evaluation.layer_history import LayerHistory
from qvgen.evaluation.report.canvas import Canvas, Chart

PICTURES = {
    "weight_sqnr_db": "Weight SQNR in dB, by layer",
    "clip_low": "Factor on the minimum of inputs, by layer",
    "clip_high": "Factor on the maximum of inputs, by layer",
    "phi_sigma_max": "Largest singular value of Phi, by layer",
}
"""Numbers of the layers that are drawn over the steps of a run, and their titles."""

_MAX_NAMES = 48
"""Names of layers that have room beside a picture; of more layers each so-manyth one is named."""

_INCHES_OF_NAME, _INCHES_AROUND, _MAX_INCHES = 0.16, 0.7, 8.4


def draw_layers(histories: Mapping[str, LayerHistory]) -> dict[str, Chart]:
    """Draw the numbers of :data:`PICTURES` that a run has; column -> its picture."""
    return {name: draw_heat_map(histories[name], title=title) for name, title in PICTURES.items() if name in histories}


def draw_heat_map(history: LayerHistory, *, title: str) -> Chart:
    """Draw a number of all layers.

    Args:
        history: The number; what is not finite stays white.
        title: What is drawn, with its unit.
    """
    values = np.ma.masked_invalid(history.values)
    names = [_short(name, history.layers) for name in history.layers]
    every = -(-len(names) // _MAX_NAMES)
    with Canvas(title, last_step=len(history.steps) - 1) as canvas:
        height = min(_MAX_INCHES, _INCHES_AROUND + _INCHES_OF_NAME * max(4, min(len(names), _MAX_NAMES)))
        canvas.figure.set_size_inches(5.2, height)
        canvas.figure.set_layout_engine("constrained")  # before the colour bar, whose place it makes
        axes = canvas.axes
        image = axes.imshow(values, aspect="auto", interpolation="nearest", cmap="viridis")
        axes.set_xlim(-0.5, len(history.steps) - 0.5)
        axes.grid(visible=False)
        shown = range(0, len(history.steps), -(-len(history.steps) // 6))
        axes.set_xticks(list(shown), [str(history.steps[place]) for place in shown])
        axes.set_yticks(range(0, len(names), every), names[::every], fontsize=7)
        canvas.figure.colorbar(image, ax=axes, pad=0.02)
        note = "" if every == 1 else f"One in {every} of {len(names)} layers is named."
        return canvas.chart(note)


def _short(name: str, names: tuple[str, ...]) -> str:
    """A layer's name without what all of them begin with, up to a point."""
    first, last = min(names), max(names)
    same = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    return name[name.rfind(".", 0, same) + 1 :]
