"""What became of the clips of a table: those that can't be used, and what of the others was left out.

Left out: captions, which are counted by the text encoder's tokenizer.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from qvgen.config.errors import UserError
from qvgen.run_directory import atomic_write


def report_bad(bad: Sequence[tuple[str, str]], *, total: int, max_bad: float, report: Path) -> None:
    """Write the clips that can't be used to a CSV file (file_name, reason), and fail where they are too many.

    Raises:
        UserError: More than ``max_bad`` of ``total`` clips are bad, or no clip is left; the report is written before.
        OSError: The report can't be written.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([("file_name", "reason"), *sorted(bad)])
    report.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(report, text.getvalue().encode())
    if too_many_bad(len(bad), total=total, max_bad=max_bad):
        name, reason = sorted(bad)[0]
        raise UserError(
            f"{len(bad)} of {total} clips can't be used, more than max_bad={max_bad:g}; see {report} "
            f"(first: {name}: {reason})"
        )


def too_many_bad(count: int, *, total: int, max_bad: float) -> bool:
    """Whether ``count`` bad clips of ``total`` are too many: above the share, or all of them."""
    return count > max_bad * total or (count > 0 and count == total)
