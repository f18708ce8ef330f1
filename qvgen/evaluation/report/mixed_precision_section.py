"""The report's section "Mixed precision": a heat map of the sensitivities of each side, and the bits that every unit got.

The numbers are read from the run's folder; see :mod:`qvgen.evaluation.mixed_precision_files`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qvgen.evaluation.mixed_precision_files import ALL_WINDOWS, DIRECTORY, Allocation, Key, combined_scores
from qvgen.evaluation.report.canvas import Chart
from qvgen.evaluation.report.heat_map import draw_matrix
from qvgen.run_directory import atomic_write

_STANDALONE = "<style>:root{--text-soft:#555;--line:#ccc;font-family:sans-serif}</style>"
"""The page's colours, for a drawing that stands alone."""


@dataclass(frozen=True, kw_only=True)
class UnitBits:
    """One unit's row of the table.

    Attributes:
        group: Group of its layers, for example self_attention.
        block: Name of the block that the layers are in.
        num_layers: Number of the layers.
        weight: Their weight bits; one number, or one for each window of timesteps with slashes.
        activation: Their activation bits, likewise.
    """

    group: str
    block: str
    num_layers: int
    weight: str
    activation: str


@dataclass(frozen=True, kw_only=True)
class BitSection:
    """The content of the section.

    Attributes:
        charts: A heat map of each side that was measured.
        units: One row each.
        allocation: Budgets and means.
    """

    charts: tuple[Chart, ...]
    units: tuple[UnitBits, ...]
    allocation: Allocation


def build_bit_section(allocation: Allocation | None) -> BitSection | None:
    """Make the section of an allocation; None where no bits were allocated."""
    if allocation is None:
        return None
    charts = (draw_sensitivity(allocation, side=side) for side in ("weight", "activation"))
    return BitSection(
        charts=tuple(chart for chart in charts if chart is not None), units=_units(allocation), allocation=allocation
    )


def _units(allocation: Allocation) -> tuple[UnitBits, ...]:
    layers: dict[tuple[str, str], list[str]] = {}
    for name, unit in allocation.units.items():
        layers.setdefault(unit, []).append(name)
    rows = []
    for (group, block), names in layers.items():
        windows = allocation.bits[names[0]]
        weight, activation = (_shown([windows[w][side] for w in sorted(windows)]) for side in (0, 1))
        rows.append(UnitBits(group=group, block=block, num_layers=len(names), weight=weight, activation=activation))
    return tuple(rows)


def _shown(widths: list[int]) -> str:
    return str(widths[0]) if len(set(widths)) == 1 else "/".join(map(str, widths))


def draw_sensitivity(allocation: Allocation, *, side: str) -> Chart | None:
    """Heat map of a side's scores, each group against its own largest; None where the side was not measured."""
    rows = [row for row in allocation.sensitivities if row.side == side and row.window != ALL_WINDOWS]
    if not rows:
        return None
    units = list(dict.fromkeys((row.group, row.block) for row in rows))
    widths, windows = sorted({row.bits for row in rows}), sorted({row.window for row in rows})
    shares = relative_scores(combined_scores(allocation.sensitivities), rows=[row.key for row in rows])
    values = np.full((len(units), len(widths) * len(windows)), np.nan)
    for row in rows:
        column = widths.index(row.bits) * len(windows) + windows.index(row.window)
        values[units.index((row.group, row.block)), column] = shares[row.key]
    svg = draw_matrix(
        np.where(values > 0, np.log10(np.where(values > 0, values, 1.0)), np.nan),
        rows={index: f"{group} {block}" for index, (group, block) in enumerate(units)},
        columns=[((index + 0.5) * len(windows), str(bits)) for index, bits in enumerate(widths)],
        below=f"bits; in each {len(windows)} windows of timesteps, sampling begins on the left",
    )
    note = "Colour: the group's own metrics as a share of its largest value here, as a power of ten; groups do not compare."
    return Chart(title=f"Sensitivity to quantized {side}s", note=note, svg=svg)


def relative_scores(scores: Mapping[Key, float], *, rows: Iterable[Key]) -> dict[Key, float]:
    """The scores of some rows as shares of the largest of these of their group; 0 where all of a group are 0."""
    shown = {key: scores[key] for key in rows}
    largest: dict[str, float] = {}
    for (group, *_), score in shown.items():
        largest[group] = max(largest.get(group, 0.0), score)
    return {key: score / largest[key[0]] if largest[key[0]] else 0.0 for key, score in shown.items()}


def write_heat_maps(run_dir: Path, allocation: Allocation) -> None:
    """Write each side's heat map as an SVG file beside the allocation's other files."""
    for side in ("weight", "activation"):
        chart = draw_sensitivity(allocation, side=side)
        if chart is not None:
            head, tag, rest = chart.svg.partition(">")
            content = head + tag + _STANDALONE + rest
            atomic_write(run_dir / DIRECTORY / f"heat_map_{side}.svg", content.encode())


def section_json(allocation: Allocation | None) -> dict[str, Any] | None:
    """The allocation as report.json holds it; None where there is none."""
    if allocation is None:
        return None
    return {
        "budget": dict(allocation.budget),
        "mean_bits": dict(allocation.mean_bits),
        "weight_bytes": allocation.weight_bytes,
        "metrics": dict(allocation.metrics),
        "measurements": len(allocation.sensitivities),
        **({"attention": dict(allocation.attention)} if allocation.attention else {}),
        "units": [
            {
                "group": unit.group,
                "block": unit.block,
                "layers": unit.num_layers,
                "weight_bits": unit.weight,
                "activation_bits": unit.activation,
            }
            for unit in _units(allocation)
        ],
    }
