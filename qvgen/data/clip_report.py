"""The fate of a table's clips: which can't be used, and which parts of the others the model does not see.

time       the seconds outside the cut
picture    the share outside the box
caption    the tokens beyond those that the text encoder takes
"""

from __future__ import annotations

import csv
import io
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qvgen.data.clips import ClipCut
from qvgen.errors import UserError
from qvgen.run_directory import atomic_write

log = logging.getLogger(__name__)

CountTokens = Callable[[str], int]
"""Caption -> how many of its tokens lie beyond those that the text encoder takes."""

_SHOWN_LETTERS = 60


@dataclass(frozen=True, kw_only=True)
class FillReport:
    """The work of one call of :func:`qvgen.data.cache_fill.fill`.

    Attributes:
        encoded: Clips whose latents it made.
        reused: Rows of its share whose latents were there already.
        bad: (name, reason) of the bad clips in its share.
        complete: Whether every row of the table is done, by whatever process.
        bad_report: CSV file (file_name, reason) of all bad clips of the table; written when complete or too many are bad.
        left_out: One line on what of all clips and captions is not used; empty until complete.
        left_out_report: CSV file of what of each clip and caption is not used; written when complete.
    """

    encoded: int
    reused: int
    bad: tuple[tuple[str, str], ...]
    complete: bool
    bad_report: Path
    left_out: str
    left_out_report: Path


def left_out_path(index_path: Path) -> Path:
    """The CSV file beside an index that says what of each clip is not used."""
    return index_path.with_suffix(".left_out.csv")


def left_out(cut: ClipCut, *, tokens: int) -> dict[str, float]:
    """The parts of a clip that are not used, as its record keeps them.

    Args:
        cut: How it is cut.
        tokens: Number of tokens of its caption that the text encoder does not take.
    """
    return {"clip_s": cut.clip_s, "used_s": cut.used_s, "used_area": cut.used_area, "tokens": tokens}


def is_left_out(value: Any) -> bool:
    """Whether a value has the form of what :func:`left_out` gives."""
    names = {"clip_s", "used_s", "used_area", "tokens"}
    return (
        isinstance(value, dict)
        and value.keys() == names
        and all(type(number) in (int, float) and math.isfinite(number) for number in value.values())
    )


def describe_left_out(rows: Sequence[Mapping[str, Any]]) -> str:
    """One line on what is not used of the clips of an index."""
    kept = [row["left_out"] for row in rows]
    longer = sum(row["clip_s"] > row["used_s"] + 1e-6 for row in kept)
    cropped = [1 - row["used_area"] for row in kept if row["used_area"] < 1 - 1e-6]
    cut = [row["tokens"] for row in kept if row["tokens"]]
    parts = [
        f"{sum(row['used_s'] for row in kept):.1f} of {sum(row['clip_s'] for row in kept):.1f} s of {len(kept)} clips are "
        f"used ({longer} are longer than their cut)"
    ]
    if cropped:
        parts.append(f"{len(cropped)} lose the edges of their pictures (up to {100 * max(cropped):.0f} %)")
    if cut:
        parts.append(
            f"{len(cut)} captions lose their end, which the text encoder does not take (up to {max(cut)} tokens)"
        )
    return "; ".join(parts)


def write_left_out(rows: Sequence[Mapping[str, Any]], *, path: Path) -> None:
    """Name what is not used of each clip of an index, in a CSV file.

    Raises:
        OSError: It can't be written.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("file_name", "seconds", "seconds_used", "picture_used", "tokens_left_out"))
    for row in rows:
        kept = row["left_out"]
        seconds = (f"{kept['clip_s']:.3f}", f"{kept['used_s']:.3f}")
        writer.writerow((row["name"], *seconds, f"{kept['used_area']:.3f}", kept["tokens"]))
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, text.getvalue().encode())


def warn_of_cut_captions(captions: Iterable[str], *, tokens_left_out: CountTokens) -> None:
    """Log a warning for each caption whose end the text encoder does not take."""
    for caption in dict.fromkeys(captions):
        tokens = tokens_left_out(caption)
        if tokens:
            shown = caption if len(caption) <= _SHOWN_LETTERS else f"{caption[:_SHOWN_LETTERS]}..."
            log.warning("the text encoder does not take the last %d tokens of the caption %r", tokens, shown)


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
