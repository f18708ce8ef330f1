"""compare.html: runs beside each other in one file that needs nothing else: table, curves over each other, videos in rows.

Videos are the runs' own mp4 files, of the packed model; the teacher's stands before the runs that have the same one. They are
left out, and that is said, beyond ``MOST_BYTES`` of them: a browser has to hold the page.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qvgen.evaluation.report.canvas import SERIES, Canvas, Chart, Series, use_log_axis
from qvgen.evaluation.report.charts import SMALL_SHARE_TITLE, running_mean
from qvgen.evaluation.report.embedded_video import ShownVideo, stored_video
from qvgen.evaluation.report.page import render_page
from qvgen.evaluation.report.run_comparison import RunTable
from qvgen.evaluation.report.run_record import RunRecord
from qvgen.evaluation.report.verdict import rule

MOST_BYTES = 64_000_000
"""Bytes of all mp4 files in a page."""

FEW_TILES = 4
"""Videos of a row; two such rows stand side by side."""

_CURVES = {
    "train/loss": "Training loss, mean |v - v_teacher|²",
    "val/relative_error": "Held-out relative error",
    "train/gradient_norm": "Gradient norm, before clipping",
    "train/gradient_norm_weights": "Gradient norm of the weights alone, before clipping",
    "phi/rank": "Rank of Phi",
    "phi/small_share": SMALL_SHARE_TITLE,
}
_LINEAR = ("phi/rank", "phi/small_share")
_DASHES = ("-", "--", ":", "-.")


@dataclass(frozen=True, kw_only=True)
class VideoRow:
    """One caption: the runs' videos of it, each after the teacher's that it belongs to."""

    prompt: str
    tiles: tuple[ShownVideo, ...]


def render_comparison(table: RunTable, *, command: str) -> str:
    """Return the page as text.

    Args:
        table: Table of the runs.
        command: makes the page again.
    """
    records = [row.record for row in table.rows]
    videos, notes = video_rows(records)
    return render_page(
        "compare.html.j2",
        table=table,
        command=command,
        colors=[f"var(--series-{index % len(SERIES) + 1})" for index in range(len(records))],
        charts=draw_overlaid(records),
        videos=videos,
        video_notes=notes,
        narrow=max((len(row.tiles) for row in videos), default=0) <= FEW_TILES,
        rule=rule(),
        finished=sum(record.state == "finished" for record in records),
    )


def draw_overlaid(records: Sequence[RunRecord]) -> tuple[Chart, ...]:
    """One drawing per curve that a run has, with all runs' curves over each other."""
    last = max((int(steps[-1]) for record in records for steps, _ in record.history.values()), default=0)
    charts = []
    for name, title in _CURVES.items():
        curves = {index: record.history[name] for index, record in enumerate(records) if name in record.history}
        curves = {index: curve for index, curve in curves.items() if np.isfinite(curve[1]).any()}
        if curves:
            charts.append(_draw(curves, title=title, last_step=last, log=name not in _LINEAR))
    return tuple(charts)


def _draw(curves: Mapping[int, Series], *, title: str, last_step: int, log: bool) -> Chart:
    log = log and all((values[np.isfinite(values)] > 0).all() for _, values in curves.values())
    note = "Colours as in the table."
    window = max(1, max(len(values) for _, values in curves.values()) // 25) | 1
    with Canvas(title, last_step=last_step) as canvas:
        for index, (steps, values) in curves.items():
            if log and window > 1 and np.isfinite(values).all():
                values = running_mean(values, window=window)
                note = "Colours as in the table. Running means."
            canvas.axes.plot(
                steps,
                values,
                color=SERIES[index % len(SERIES)],
                linestyle=_DASHES[index // len(SERIES) % len(_DASHES)],
                linewidth=1.6,
                drawstyle="default" if log else "steps-post",
                marker="o" if len(values) == 1 else "",
                markersize=3,
            )
        if log:
            use_log_axis(canvas.axes)
        return canvas.chart(note)


def video_rows(records: Sequence[RunRecord]) -> tuple[list[VideoRow], list[str]]:
    """The rows of all captions that a run shows, and what was left out of them."""
    prompts = list(dict.fromkeys(prompt for record in records for prompt in _shown(record)))
    rows: list[VideoRow] = []
    notes: list[str] = []
    budget = MOST_BYTES
    for number, (index, prompt) in enumerate(prompts):
        tiles, used = _tiles(records, index, prompt, notes)
        budget -= used
        if budget < 0:
            left = len(prompts) - number
            notes.append(f"{left} more captions are left out of the page; their videos lie in the runs' folders.")
            break
        if tiles:
            rows.append(VideoRow(prompt=prompt, tiles=tuple(tiles)))
    return rows, notes


def _tiles(records: Sequence[RunRecord], index: int, prompt: str, notes: list[str]) -> tuple[list[ShownVideo], int]:
    """Tiles of one row, and the bytes of their files."""
    tiles: list[ShownVideo] = []
    teachers: set[tuple[Any, ...]] = set()
    used = 0
    for record in records:
        video = _shown(record).get((index, prompt))
        if video is None:
            continue
        seed = video["seed"]
        teacher = (record.text("model"), seed, *(record.value("quality", k) for k in ("num_steps", "guidance_scale")))
        wanted = [("packed", record.name)] if teacher in teachers else [("teacher", "Teacher"), ("packed", record.name)]
        for variant, label in wanted:
            # By beginning and end of its name alone: another version of qvgen may shorten the prompt between them otherwise.
            pattern = f"{index:02d}-*seed{seed}-{variant}.mp4"
            path = next((record.path / "videos").glob(pattern), None)
            if path is None:
                notes.append(f"{record.name}: videos/{pattern} is missing.")
                continue
            try:
                tiles.append(stored_video(path, label=label, note=f"seed {seed}"))
                used += path.stat().st_size
                teachers.update([teacher] if variant == "teacher" else [])
            except (ValueError, OSError) as error:
                notes.append(f"{record.name}: videos/{path.name} cannot be shown ({type(error).__name__}).")
    return tiles, used


def _shown(record: RunRecord) -> dict[tuple[int, str], Mapping[str, Any]]:
    """The videos of a run's report by place and prompt; malformed entries are left out."""
    videos = record.value("videos")
    return {
        (index, video["prompt"]): video
        for index, video in enumerate(videos if isinstance(videos, list) else ())
        if isinstance(video, Mapping) and isinstance(video.get("prompt"), str) and type(video.get("seed")) is int
    }
