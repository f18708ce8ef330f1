"""Numbers that papers published, to stand beside evaluations: what they are, and where they come from.

Nothing of them was measured here, and nothing of them is comparable to a value of another set of prompts, another model or
another number of videos: they stand in a table of their own, marked as published.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class PublishedTable:
    """One paper's table, or a part of it.

    Attributes:
        model: The model that was quantized.
        source: The paper.
        unit: The unit of every value, in words.
        columns: Headings.
        rows: Name of the method and bits, and a value for each column; None: the source known here gives none.
    """

    model: str
    source: str
    unit: str
    columns: tuple[str, ...]
    rows: Mapping[str, tuple[float | None, ...]]


TABLES: dict[str, PublishedTable] = {
    "qvgen": PublishedTable(
        model="CogVideoX-2B",
        source="QVGen, arXiv 2505.11497",
        unit="VBench, %, higher is better",
        columns=("Imaging Quality", "Dynamic Degree", "Scene", "total"),
        rows={
            "bfloat16": (59.15, 67.78, 36.24, 80.95),
            "SVDQuant W4A6": (58.27, 40.83, 27.69, None),
            "Q-DM W4A4": (54.96, 48.61, 28.02, 78.44),
            "QVGen W4A4": (60.16, 67.22, 31.42, 80.62),
            "QVGen W3A3": (58.36, 53.89, 23.85, None),
        },
    ),
    "dvd_quant": PublishedTable(
        model="HunyuanVideo",
        source="DVD-Quant, arXiv 2505.18663",
        unit="VBench, %, higher is better",
        columns=("Aesthetic Quality", "Imaging Quality", "Scene"),
        rows={"bfloat16": (62.53, 64.78, 42.81), "DVD-Quant W4A4": (61.96, 61.82, 29.94)},
    ),
}
"""The tables by the names that ``qvgen compare ... published=NAME`` knows."""


def published_markdown(name: str) -> str:
    """A table as Markdown, with a line before it that says what it is."""
    table = TABLES[name]
    lines: list[Sequence[str]] = [[f"{table.model} (published)", *table.columns], ["---"] * (1 + len(table.columns))]
    for row, values in table.rows.items():
        lines.append([row, *("\N{EN DASH}" if value is None else f"{value:.2f}" for value in values)])
    text = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    return f"Published, not measured here: {table.source} ({table.unit})\n\n{text}"


def published_json(name: str) -> dict[str, object]:
    """A table as compare.json holds it."""
    table = TABLES[name]
    rows = {row: dict(zip(table.columns, values, strict=True)) for row, values in table.rows.items()}
    return {"name": name, "model": table.model, "source": table.source, "unit": table.unit, "rows": rows}
