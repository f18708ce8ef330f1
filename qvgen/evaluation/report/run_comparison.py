"""Runs beside each other: the columns of their table, as text, for a page and as JSON."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from qvgen.evaluation.json_number import json_number
from qvgen.evaluation.report.page_format import format_bytes, format_db, format_number, format_seconds
from qvgen.evaluation.report.run_record import RunRecord, differing_settings
from qvgen.evaluation.report.verdict import LEVELS, Level


@dataclass(frozen=True, kw_only=True)
class Column:
    """One measured column.

    Attributes:
        key: name of the column in compare.json.
        label: words above the column.
        path: where report.json holds the number.
        shown: turns the number into text.
        better: which end is the better one; None: neither.
        metric: whose level of ``verdict`` colours it; empty: none.
    """

    key: str
    label: str
    path: tuple[str, ...]
    shown: Callable[[float | None], str]
    better: Literal["low", "high"] | None
    metric: str = ""


_PACKED = ("quality", "variants", "packed")
_SAMPLING = ("sampling", "variants", "packed")

COLUMNS: tuple[Column, ...] = (
    Column(key="error_ptq", label="error PTQ", path=("relative_error", "ptq"), shown=format_number, better="low"),
    Column(
        key="error_packed", label="error packed", path=("relative_error", "packed"), shown=format_number, better="low"
    ),
    Column(key="psnr_db", label="PSNR", path=(*_PACKED, "psnr_db"), shown=format_db, better="high", metric="psnr_db"),
    Column(key="ssim", label="SSIM", path=(*_PACKED, "ssim"), shown=format_number, better="high", metric="ssim"),
    Column(key="lpips", label="LPIPS", path=(*_PACKED, "lpips"), shown=format_number, better="low", metric="lpips"),
    Column(
        key="flow_difference",
        label="flow difference",
        path=(*_PACKED, "flow_difference"),
        shown=format_number,
        better="low",
    ),
    Column(
        key="flicker", label="flicker", path=(*_PACKED, "flicker"), shown=format_number, better="low", metric="flicker"
    ),
    Column(key="bytes_packed", label="size", path=("bytes", "packed"), shown=format_bytes, better="low"),
    Column(
        key="seconds_per_video",
        label="a video",
        path=(*_SAMPLING, "seconds_per_video"),
        shown=format_seconds,
        better="low",
    ),
    Column(key="peak_bytes", label="peak memory", path=(*_SAMPLING, "peak_bytes"), shown=format_bytes, better="low"),
    Column(key="seconds_train", label="training", path=("seconds", "train"), shown=format_seconds, better="low"),
)


@dataclass(frozen=True, kw_only=True)
class TableCell:
    """One number: as text, for sorting, how good it is, and whether no other run has a better one."""

    text: str
    value: float | None
    level: Level | None
    best: bool


@dataclass(frozen=True, kw_only=True)
class TableRow:
    """One run: its settings and numbers, as many as there are columns."""

    record: RunRecord
    settings: tuple[str, ...]
    verdict: Level | None
    cells: tuple[TableCell, ...]


@dataclass(frozen=True, kw_only=True)
class RunTable:
    """The whole table.

    Attributes:
        settings: keys that are not the same in all runs.
        columns: measured columns; a column that no run has is left out.
        rows: one per run, in the order in which they were named.
        notes: what makes numbers that should not be compared.
    """

    settings: tuple[str, ...]
    columns: tuple[Column, ...]
    rows: tuple[TableRow, ...]
    notes: tuple[str, ...]


def build_table(records: Sequence[RunRecord]) -> RunTable:
    """Put runs into one table."""
    settings = differing_settings(records)
    columns = [column for column in COLUMNS if any(record.number(*column.path) is not None for record in records)]
    best = {column.key: _best(column, records) for column in columns}
    return RunTable(
        settings=tuple(settings),
        columns=tuple(columns),
        rows=tuple(
            TableRow(
                record=record,
                settings=tuple(values[index] for values in settings.values()),
                verdict=_level(record.value("verdict", "level")),
                cells=tuple(_cell(column, record, best=best[column.key]) for column in columns),
            )
            for index, record in enumerate(records)
        ),
        notes=tuple(_notes(records)),
    )


def _best(column: Column, records: Sequence[RunRecord]) -> float | None:
    """The best value, where several runs have one and they differ."""
    values = [value for record in records if (value := record.number(*column.path)) is not None and value == value]
    if column.better is None or len(set(values)) < 2:
        return None
    return min(values) if column.better == "low" else max(values)


def _cell(column: Column, record: RunRecord, *, best: float | None) -> TableCell:
    value = record.number(*column.path)
    level = _level(record.value("verdict", "variants", "packed", "metrics", column.metric)) if column.metric else None
    return TableCell(text=column.shown(value), value=value, level=level, best=value is not None and value == best)


def _level(value: Any) -> Level | None:
    return next((level for level in LEVELS if level == value), None)


def _notes(records: Sequence[RunRecord]) -> list[str]:
    """Differences that forbid a comparison."""
    notes = []
    asked: tuple[tuple[str, str, tuple[tuple[str, ...], ...]], ...] = (
        (
            "errors are measured on different inputs",
            "relative_error_measured_on",
            (("num_samples",), ("split",), ("seed",)),
        ),
        ("videos have different captions, noise or sampling", "quality", (("num_videos",), ("seeds",), ("num_steps",))),
        ("times are of different machines", "machine", (("cpu",), ("num_cores",), ("num_threads",))),
    )
    finished = [record for record in records if record.state == "finished"]
    for sentence, section, paths in asked:
        conditions = {
            tuple(str(record.value(section, *path)) for path in paths) for record in finished if record.value(section)
        }
        if len(conditions) > 1:
            notes.append(f"{sentence}: compare with care")
    return notes


def table_lines(table: RunTable) -> list[str]:
    """The table as text: one line per run, one more for what is wrong with it, then the notes."""
    head = ["run", *table.settings, "videos", *(c.label for c in table.columns)]
    rows = [head]
    for row in table.rows:
        verdict = row.verdict or ("-" if row.record.state == "finished" else row.record.state)
        rows.append([row.record.name, *row.settings, verdict, *(_starred(cell) for cell in row.cells)])
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    left = 1 + len(table.settings) + 1
    lines = [
        "  ".join(
            text.ljust(width) if column < left else text.rjust(width)
            for column, (text, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    wrong = [f"{row.record.name}: {row.record.state}: {row.record.why}" for row in table.rows if row.record.why]
    return [*lines, *wrong, *table.notes]


def _starred(cell: TableCell) -> str:
    """The best of a column has a star."""
    return f"{cell.text.replace(chr(0x202F), ' ')}{'*' if cell.best else ''}"


def table_json(table: RunTable) -> dict[str, Any]:
    """The content of compare.json."""
    return {
        "settings": list(table.settings),
        "runs": [_run_json(table, row) for row in table.rows],
        "notes": list(table.notes),
    }


def _run_json(table: RunTable, row: TableRow) -> dict[str, Any]:
    record = row.record
    numbers: Mapping[str, float | None] = {column.key: record.number(*column.path) for column in COLUMNS}
    return {
        "name": record.name,
        "run_dir": str(record.path),
        "state": record.state,
        "why": record.why,
        "settings": dict(zip(table.settings, row.settings, strict=True)),
        "verdict": row.verdict,
        **{key: json_number(_whole(value)) for key, value in numbers.items()},
        "bytes_bf16": json_number(_whole(record.number("bytes", "bf16"))),
        "kernels": record.value(*_SAMPLING, "kernels"),
        "command": record.text("command"),
    }


def _whole(value: float | None) -> float | None:
    """Bytes and the like as whole numbers."""
    return int(value) if value is not None and math.isfinite(value) and value == int(value) else value
