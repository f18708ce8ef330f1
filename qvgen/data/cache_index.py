"""The index of a table in a cache: all its rows in one file, column by column, and whether the cache's files are still whole.

    INDEX.json     {"bad": [[name, reason], ...], "rows": {"row": [0, 2, ...], "name": [...], "clip": [...], ...}}
    INDEX.state    SHA-256 of sizes and times of the files that the rows need, as they were when all seals were looked at

A table of 100 000 clips shall open in a second. As columns the index is read and checked in a third of the time that a list
of rows takes, and files whose sizes and times are as they were need no look at their seals. A state that is missing or
damaged, or files that were copied, cost that look once more and nothing else.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from array import array
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, overload

from qvgen.run_directory import atomic_write

log = logging.getLogger(__name__)

DIGESTS = ("clip", "latents", "latents_sha256", "text", "text_sha256")
TEXTS = ("name", "caption", "bucket")
LEFT_OUT = ("clip_s", "used_s", "used_area", "tokens")
"""Names of the numbers in ``left_out``; see :func:`qvgen.data.clip_report.left_out`."""

COLUMNS = ("row", *TEXTS, *DIGESTS, *LEFT_OUT)


class IndexRows(Sequence[Mapping[str, Any]]):
    """Usable rows of a table: ``row``, those of :data:`TEXTS` and :data:`DIGESTS`, and ``left_out`` with its numbers.

    Args:
        columns: Values of all rows, by the names of :data:`COLUMNS`.
    """

    def __init__(self, columns: Mapping[str, Sequence[Any]]) -> None:
        self.columns = columns

    @classmethod
    def of(cls, rows: Iterable[Mapping[str, Any]]) -> Self:
        """Rows that were found one by one, with whatever else they hold left out."""
        flat = [{**row, **row["left_out"]} for row in rows]
        return cls({name: [row[name] for row in flat] for name in COLUMNS})

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.columns["row"])

    @overload
    def __getitem__(self, index: int) -> Mapping[str, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Mapping[str, Any]]: ...
    def __getitem__(self, index: int | slice) -> Mapping[str, Any] | Sequence[Mapping[str, Any]]:
        """Row ``index``, or some."""
        if isinstance(index, slice):
            return self.chosen(range(*index.indices(len(self))))
        row = {name: self.columns[name][index] for name in COLUMNS if name not in LEFT_OUT}
        return row | {"left_out": {name: self.columns[name][index] for name in LEFT_OUT}}

    def chosen(self, indices: Sequence[int]) -> IndexRows:
        """The rows of these indices, in their order."""
        return IndexRows({name: [column[i] for i in indices] for name, column in self.columns.items()})


def write_index(path: Path, rows: IndexRows, *, bad: Iterable[tuple[str, str]]) -> None:
    """Write an index.

    Args:
        path: The file.
        rows: Usable rows.
        bad: (name, reason) of the others.
    """
    atomic_write(path, json.dumps({"bad": sorted(bad), "rows": rows.columns}, sort_keys=True).encode())


def read_index(path: Path) -> tuple[IndexRows, list[Any]] | None:
    """The usable rows, and (name, reason) of the bad ones; None where there is no index or it is damaged."""
    try:
        index = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError, RecursionError):
        return None
    if not isinstance(index, dict) or index.keys() != {"rows", "bad"} or not isinstance(index["bad"], list):
        return None
    return (IndexRows(index["rows"]), index["bad"]) if _are_columns(index["rows"]) else None


def _are_columns(columns: Any) -> bool:
    """Whether a value has the form of an index's rows; digests in it become names of files."""
    if not isinstance(columns, dict) or columns.keys() != set(COLUMNS):
        return False
    if not all(isinstance(column, list) for column in columns.values()) or len(set(map(len, columns.values()))) != 1:
        return False
    kinds = {name: set(map(type, column)) for name, column in columns.items()}
    return (
        kinds["row"] <= {int}
        and all(kinds[name] <= {str} for name in (*TEXTS, *DIGESTS))
        and all(kinds[name] <= {int, float} and all(map(math.isfinite, columns[name])) for name in LEFT_OUT)
        and all(_are_digests(columns[name]) for name in DIGESTS)
    )


def _are_digests(texts: list[str]) -> bool:
    """Whether each of them is a SHA-256 in hexadecimal digits."""
    return set(map(len, texts)) <= {64} and not "".join(texts).encode().translate(None, b"0123456789abcdef")


def state_of(files: Iterable[str]) -> str | None:
    """SHA-256 of sizes and times of files, in their order; None where one is missing."""
    numbers = array("q")
    try:
        for file in files:
            state = os.stat(file)
            numbers.extend((state.st_size, state.st_mtime_ns, state.st_ctime_ns))
    except FileNotFoundError:
        return None
    return hashlib.sha256(numbers).hexdigest()


def read_state(index_path: Path) -> str | None:
    """The state that was kept of an index's files; None where there is none."""
    try:
        return _state_path(index_path).read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError):
        return None


def keep_state(index_path: Path, state: str) -> None:
    """Keep it, where the folder can be written; somebody else's cache may not be."""
    try:
        atomic_write(_state_path(index_path), state.encode())
    except OSError as error:
        log.debug("the state of %s is not kept: %s", index_path, error)


def _state_path(index_path: Path) -> Path:
    return index_path.with_suffix(".state")
