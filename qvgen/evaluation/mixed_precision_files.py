"""Mixed precision in files: measured sensitivities, the allocation that was made of them, and how a run's folder keeps both.

    RUN_DIR/mixed_precision/sensitivity.csv    a row per (group, block, side, bits, window of timesteps), a column per metric
    RUN_DIR/mixed_precision/allocation.json    the budget, what was reached, and {layer: {window: [weight, activation bits]}};
                                               {attention: bits} where attentions were weighed

While measuring, rows are appended to a JSONL file as they come: a run that is killed loses the row that it was at.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from qvgen.run_directory import atomic_write

log = logging.getLogger(__name__)

DIRECTORY = "mixed_precision"
ALL_WINDOWS = -1
"""The number of a window that stands for all windows of timesteps at once."""

Key = tuple[str, str, str, int, int]
"""(group, block, side, bits, window) of a measurement."""

TABLE_FILE, ALLOCATION_FILE = "sensitivity.csv", "allocation.json"


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """The effect of one quantization: of one side of one unit, in one window of timesteps, all else in full precision.

    Attributes:
        group: Group of the unit's layers, for example self_attention.
        block: Name of the block that the layers are in.
        side: "weight", "activation" or "attention".
        bits: Bits of that side.
        window: Window of timesteps; 0 is where sampling begins, -1 all of them at once.
        output_error: mean squared difference of the sampled videos to the full-precision model's, pixels in [0, 1].
        scores: Name of each of the group's own metrics -> its value; larger is worse.
        seconds: Wall-clock time of the measurement.
    """

    group: str
    block: str
    side: str
    bits: int
    window: int
    output_error: float
    scores: Mapping[str, float]
    seconds: float

    @property
    def key(self) -> Key:
        """The measurement, without its result."""
        return (self.group, self.block, self.side, self.bits, self.window)


_COLUMNS = {
    "group": str, "block": str, "side": str, "bits": int, "window": int, "output_error": float, "seconds": float,
}  # fmt: skip


class SensitivityStore:
    """Rows in a JSONL file, appended as they come.

    Args:
        path: The file; its folder is made when something is added.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self, *, warns: bool = True) -> dict[Key, Sensitivity]:
        """The rows by their key; lines that are damaged are left out with a warning: they are measured again.

        The last line may be half a row of a killed process; it is left out without a warning.

        Args:
            warns: Say which lines are damaged.
        """
        if not self.path.is_file():
            return {}
        rows = {}
        lines = self.path.read_bytes().split(b"\n")
        for number, line in enumerate(lines, start=1):
            if not line:
                continue
            row = _read_sensitivity(line)
            if row is not None:
                rows[row.key] = row
            elif warns and number < len(lines):  # it ends with a newline, so it was written whole
                log.warning("%s, line %d is damaged; what it said is measured again", self.path, number)
        return rows

    def add(self, row: Sensitivity) -> None:
        """Append a row and force it to the disk; raises OSError where that fails."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a+b") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                torn = file.read(1) != b"\n"
                if torn:  # a process that was killed left a part of its line
                    whole = self.path.read_bytes()
                    file.truncate(whole.rfind(b"\n") + 1)
            file.write(json.dumps(asdict(row)).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())


def _read_sensitivity(line: bytes) -> Sensitivity | None:
    """A line of the store; None where it is damaged."""
    try:
        row = Sensitivity(**json.loads(line))
        numbers = (row.output_error, row.seconds, *row.scores.values())
    except (ValueError, TypeError, AttributeError, RecursionError):
        return None
    whole = all(isinstance(getattr(row, name), kind) for name, kind in _COLUMNS.items() if kind is not float)
    return row if whole and all(isinstance(value, int | float) for value in numbers) else None


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """The bits that every layer got, with the measurements and budgets that they follow from.

    Attributes:
        sensitivities: Every row that was measured; empty where both budgets left no choice.
        bits: layer -> window of timesteps -> (weight bits, activation bits).
        units: layer -> (group, block).
        window_of_band: Window of every noise band, cleanest first.
        budget: side -> what was asked for, in words.
        mean_bits: side -> mean over weights or quantized values, and over the calls of the sampled videos.
        weight_bytes: Bytes of the packed weight codes, all sets of them.
        metrics: group -> names of the metrics that its units were compared by, with " + " between them.
        attention: Name of an attention -> 8 or 12, 16 where it is left in floating point; empty where they were not weighed.
    """

    sensitivities: tuple[Sensitivity, ...]
    bits: Mapping[str, Mapping[int, tuple[int, int]]]
    units: Mapping[str, tuple[str, str]]
    window_of_band: tuple[int, ...]
    budget: Mapping[str, str]
    mean_bits: Mapping[str, float]
    weight_bytes: int
    metrics: Mapping[str, str]
    attention: Mapping[str, int] = field(default_factory=dict)


def write_allocation(run_dir: Path, allocation: Allocation) -> None:
    """Write both files into a run's folder."""
    folder = run_dir / DIRECTORY
    folder.mkdir(exist_ok=True)
    text = io.StringIO()
    metrics = dict.fromkeys(chain.from_iterable(row.scores for row in allocation.sensitivities))
    writer = csv.DictWriter(text, [*_COLUMNS, *metrics], lineterminator="\n")
    writer.writeheader()
    for row in allocation.sensitivities:
        writer.writerow({**{name: getattr(row, name) for name in _COLUMNS}, **row.scores})
    atomic_write(folder / TABLE_FILE, text.getvalue().encode())
    content: dict[str, Any] = {
        "budget": dict(allocation.budget),
        "mean_bits": dict(allocation.mean_bits),
        "weight_bytes": allocation.weight_bytes,
        "metrics": dict(allocation.metrics),
        "window_of_band": list(allocation.window_of_band),
        "units": {layer: list(unit) for layer, unit in allocation.units.items()},
        "bits": {
            layer: {str(window): list(pair) for window, pair in windows.items()}
            for layer, windows in allocation.bits.items()
        },
    }
    if allocation.attention:
        content["attention"] = dict(allocation.attention)
    atomic_write(folder / ALLOCATION_FILE, (json.dumps(content, indent=1) + "\n").encode())


def read_allocation(run_dir: Path) -> Allocation | None:
    """Read what :func:`write_allocation` wrote; None where there is nothing.

    Raises:
        ValueError: A file is damaged.
    """
    folder = run_dir / DIRECTORY
    if not (folder / ALLOCATION_FILE).is_file():
        return None
    try:
        content = json.loads((folder / ALLOCATION_FILE).read_text(encoding="utf-8"))
        return Allocation(
            sensitivities=_read_table(folder / TABLE_FILE),
            bits={
                layer: {int(window): (pair[0], pair[1]) for window, pair in windows.items()}
                for layer, windows in content["bits"].items()
            },
            units={layer: (unit[0], unit[1]) for layer, unit in content["units"].items()},
            window_of_band=tuple(content["window_of_band"]),
            budget=content["budget"],
            mean_bits=content["mean_bits"],
            weight_bytes=content["weight_bytes"],
            metrics=content["metrics"],
            attention=content.get("attention", {}),
        )
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise ValueError(f"{folder} holds no allocation of bits ({error}); start another run") from error


def _read_table(path: Path) -> tuple[Sensitivity, ...]:
    with path.open(newline="", encoding="utf-8") as file:
        return tuple(
            Sensitivity(
                **{name: kind(row[name]) for name, kind in _COLUMNS.items()},
                scores={name: float(cell) for name, cell in row.items() if name not in _COLUMNS and cell != ""},
            )
            for row in csv.DictReader(file)
        )


def combined_scores(rows: Iterable[Sensitivity]) -> dict[Key, float]:
    """One number per row, by its key, that compares the units of a group.

    The value itself where a group has one metric. Several are not commensurable, so each is divided by its mean over the
    group's measurements of that side in all windows at once (in each, where there is one window), and added.

        >>> def row(block, **scores):
        ...     return Sensitivity(group="ffn", block=block, side="weight", bits=4, window=-1, output_error=0.0,
        ...                        scores=scores, seconds=0.0)
        >>> list(combined_scores([row("a", lpips=0.1), row("b", lpips=0.3)]).values())
        [0.1, 0.3]
        >>> list(combined_scores([row("a", lpips=0.1, raft=2.0), row("b", lpips=0.3, raft=2.0)]).values())
        [1.5, 2.5]
    """
    tables: dict[tuple[str, str], list[Sensitivity]] = {}
    for row in rows:
        tables.setdefault((row.group, row.side), []).append(row)
    combined = {}
    for table in tables.values():
        divisors = dict.fromkeys(table[0].scores, 1.0)
        if len(divisors) > 1:
            whole = [row for row in table if row.window == ALL_WINDOWS] or table
            means = {name: sum(row.scores[name] for row in whole) / len(whole) for name in divisors}
            divisors = {
                name: mean or 1.0 for name, mean in means.items()
            }  # a mean of 0: by this metric no width changes anything
        combined.update({row.key: sum(row.scores[name] / by for name, by in divisors.items()) for row in table})
    return combined
