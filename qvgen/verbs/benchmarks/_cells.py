"""Cells of a benchmark that are whole runs: each has a folder of its own, goes on where it was stopped, and is run once.

    RUN_DIR/cell.json    {"of": checksum of what its results depend on, "report.json": SHA-256, "metrics.csv": SHA-256}

It is written when a cell is finished: another command over the same folder, with more methods or seeds, reads the cell's
results then and does not draw its videos and its report again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from qvgen.config.bits import Bits
from qvgen.config.build import build, check
from qvgen.config.command_line import parts_of_job
from qvgen.config.compose import compose_plain
from qvgen.config.flags import parse_flags
from qvgen.config.run_comparison import as_plain
from qvgen.config.schema.train import TrainConfig
from qvgen.config.schema.verbs import BenchmarkConfig
from qvgen.evaluation.report.run_record import REPORT_FILE
from qvgen.run_directory import atomic_write
from qvgen.verbs import import_verb
from qvgen.verbs._parts import run_facts
from qvgen.verbs.benchmarks.base import Group

CELL_FILE = "cell.json"
METRICS_FILE = "metrics.csv"


def run_of_cell(
    config: BenchmarkConfig,
    verb: str,
    cell: Mapping[str, str | int],
    *,
    name: str,
    without: Sequence[str] = (),
) -> dict[str, Any]:
    """The configuration of a run that is one cell of a benchmark: what was typed for that, and the cell's own keys.

    Args:
        config: The benchmark's.
        verb: ``train`` or ``ptq``.
        cell: Keys of the run.
        name: Folder of the run below the benchmark's ``run_dir``.
        without: Keys and sections that the verb does not have: what was typed for them is left out.
    """
    own = {field.name for field in fields(BenchmarkConfig)} | {"run_dir", "resume", *cell}
    words = [(word.lstrip("+").partition("=")[0], word) for word in parse_flags(config.run.typed).overrides]
    typed = [word for key, word in words if key not in own and key.partition(".")[0] not in without]
    alone = {} if verb != "train" or any(key == "devices" for key, _ in words) else {"devices": 1}
    further = {**alone, **cell, "run_dir": config.run.run_dir / name, "resume": "true"}
    return compose_plain(verb, [*typed, *(f"{key}={value}" for key, value in further.items())])


def run_cell(verb: str, plain: Mapping[str, Any]) -> dict[str, Any]:
    """Run a cell, go on with it, or take what it wrote when it was finished; its report."""
    config = build(verb, plain)
    run_dir: Path = config.run_dir
    if not _is_finished(run_dir, _cell_key(config)):
        with parts_of_job():
            import_verb(verb).run(config)
        atomic_write(run_dir / CELL_FILE, json.dumps({"of": _cell_key(config), **_results(run_dir)}).encode())
    report: dict[str, Any] = json.loads((run_dir / REPORT_FILE).read_text(encoding="utf-8"))
    return report


def _cell_key(config: TrainConfig) -> str:
    """A checksum of all that a cell's results depend on: its configuration, code, model, data and machine."""
    settings = {key: value for key, value in as_plain(config.plain).items() if key != "resume"}
    text = json.dumps([settings, run_facts(config)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _results(run_dir: Path) -> dict[str, str | None]:
    """Name -> SHA-256 of the files that a row is read from; None for one that the run does not have."""
    paths = [run_dir / name for name in (REPORT_FILE, METRICS_FILE)]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None for path in paths}


def _is_finished(run_dir: Path, key: str) -> bool:
    """Whether the folder holds the results of a finished cell of this key, as they were written."""
    try:
        content = json.loads((run_dir / CELL_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return bool(content == {"of": key, **_results(run_dir)}) and (run_dir / REPORT_FILE).is_file()


Cell = tuple[int, Bits, str]
"""Seed, bit-width, and the name of what is compared."""


def finished_runs(
    config: BenchmarkConfig,
    names: Sequence[str],
    *,
    plain: Callable[[int, Bits, str], tuple[str, dict[str, Any]]],
    done: Container[Group],
) -> Iterator[tuple[Cell, Path, dict[str, Any]]]:
    """Run the cell of every seed, bit-width and name, in this order.

    Args:
        config: The benchmark's.
        names: What is compared.
        plain: Verb and configuration of a cell, by :func:`run_of_cell`; all are checked before the first one runs for hours.
        done: Seed, label of the bit-width and name of cells that are left out.

    Yields:
        A cell, its run's folder and report.
    """
    cells = [(seed, width, name) for seed in config.seeds for width in config.widths for name in names]
    runs = {cell: plain(*cell) for cell in cells}
    for verb, content in runs.values():
        check(verb, content)
    for cell, (verb, content) in runs.items():
        seed, width, name = cell
        if (seed, width.label, name) not in done:
            yield cell, Path(content["run_dir"]), run_cell(verb, content)
