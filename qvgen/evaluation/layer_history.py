"""The table of a run's layers over its steps, as a report and a dashboard read it (training/callbacks/layer_metrics.py)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qvgen.evaluation.metric_rows import read_metric_rows

LAYER_FILE = "layer_metrics.csv"
LAYER_COLUMNS = (
    "step", "layer", "weight_sqnr_db", "clip_low", "clip_high", "phi_rank", "phi_gate", "phi_sigma_max", "phi_sigma_min",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class LayerHistory:
    """One number of all layers over the steps that were looked at.

    Attributes:
        steps: Optimizer steps, rising, S of them.
        layers: Names, L of them, in the model's order.
        values: float64 [L, S]; NaN where there is none.
    """

    steps: tuple[int, ...]
    layers: tuple[str, ...]
    values: np.ndarray


def read_layer_rows(path: Path) -> tuple[list[dict[str, str]], bool]:
    """The rows of a table that may be damaged, and whether some had to be left out (:mod:`qvgen.evaluation.metric_rows`)."""
    return read_metric_rows(path, texts=("layer",))


def layer_histories(rows: Sequence[Mapping[str, str]]) -> dict[str, LayerHistory]:
    """Each number of the layers over the steps: column -> its history; a column without any number is left out.

    A run that was resumed may hold a step twice; the later row counts.

    Example:
        >>> rows = [{"step": "0", "layer": "a", "clip_low": "0.5"}, {"step": "9", "layer": "a", "clip_low": "0.25"}]
        >>> history = layer_histories(rows)["clip_low"]
        >>> history.steps, history.layers, history.values.tolist()
        ((0, 9), ('a',), [[0.5, 0.25]])
    """
    steps = tuple(sorted({int(row["step"]) for row in rows}))
    layers = tuple(dict.fromkeys(row["layer"] for row in rows))
    at_step, at_layer = ({name: place for place, name in enumerate(names)} for names in (steps, layers))
    histories = {}
    for column in LAYER_COLUMNS[2:]:
        values = np.full((len(layers), len(steps)), np.nan)
        for row in rows:
            if cell := row.get(column):
                values[at_layer[row["layer"]], at_step[int(row["step"])]] = float(cell)
        if not np.isnan(values).all():
            histories[column] = LayerHistory(steps=steps, layers=layers, values=values)
    return histories
