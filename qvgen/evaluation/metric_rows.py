"""Rows of a metrics.csv that may be damaged: rows that can be read are kept, all others are counted."""

from __future__ import annotations

import csv
import io
import logging
from collections.abc import Collection
from pathlib import Path

log = logging.getLogger(__name__)


def read_metric_rows(path: Path, *, texts: Collection[str] = ()) -> tuple[list[dict[str, str]], bool]:
    """Rows whose step is a whole number and whose other cells are numbers or empty, in the file's order.

    A table beside checkpoints that are whole must not keep a run from going on, so what a program saved in another encoding
    or a disk damaged is left out, with a warning that counts it. Half a row at the end is
    what a killed process leaves; it is left out without a warning.

    Args:
        path: A table with the column "step"; one that is not there, or whose first line is damaged, has no rows.
        texts: Columns whose cells are words, and not empty.

    Returns:
        The rows, and whether something besides half a row at the end was left out.
    """
    if not path.is_file():
        return [], False
    text = path.read_bytes().decode("utf-8-sig", errors="replace").replace("\0", "\ufffd")
    reader = csv.DictReader(io.StringIO(text))
    try:
        if "step" not in (reader.fieldnames or []):
            log.warning("%s has no column 'step' in its first line; none of its rows are used", path)
            return [], True
        rows: list[dict[str, str]] = list(reader)
    except csv.Error as error:
        log.warning("%s can't be read as a table (%s); none of its rows are used", path, error)
        return [], True
    if rows and not text.endswith("\n") and not _is_good(rows[-1], texts=texts):
        rows.pop()
    good = [row for row in rows if _is_good(row, texts=texts)]
    if len(good) < len(rows):
        log.warning("%s: %d of %d rows are damaged and are left out", path, len(rows) - len(good), len(rows))
    return good, len(good) < len(rows)


def _is_good(row: dict[str, str], *, texts: Collection[str]) -> bool:
    """All cells there and none more, the step a count, the others numbers."""
    if None in row or None in row.values() or not (row["step"].isascii() and row["step"].isdigit()):
        return False
    if not all(row.get(name) for name in texts):
        return False
    return all(cell == "" or _is_number(cell) for name, cell in row.items() if name not in ("step", *texts))


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True
