"""evaluation.html: an evaluation in one file that needs nothing else: table, spread over prompts, best and worst pairs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from qvgen.evaluation.report.canvas import FIRST, SECOND, Canvas, Chart
from qvgen.evaluation.report.embedded_video import ShownVideo, shown_video
from qvgen.evaluation.report.evaluation_row import heading, latex_row, markdown_row, with_interval
from qvgen.evaluation.report.page import render_page
from qvgen.evaluation.report.page_format import format_number
from qvgen.evaluation.report.vbench_scores import missing_line, score_rows

NUM_PAIRS = 4
"""Best and worst videos that a page shows, of each."""

Frames = Callable[[str], tuple[Tensor, Tensor | None]]
"""Name of a video -> its frames and the reference's, uint8 [F, H, W, 3]."""


@dataclass(frozen=True, kw_only=True)
class ShownPair:
    """One video beside the reference's."""

    caption: str
    tiles: tuple[ShownVideo, ...]


@dataclass(frozen=True, kw_only=True)
class MetricRow:
    """One metric as the page's table has it."""

    heading: str
    value: str
    reference: str
    change: str
    num_videos: int
    about: str
    note: str


def render_evaluation(content: Mapping[str, Any], *, frames: Frames, fps: float) -> str:
    """Return the page as text.

    Args:
        content: What evaluation.json holds.
        frames: Reads the videos that are shown.
        fps: Their frames per second.
    """
    judge, best, worst = shown_videos(content)
    pairs = [[_pair(video, judge, content, frames=frames, fps=fps) for video in part] for part in (best, worst)]
    return render_page(
        "evaluation.html.j2",
        content=content,
        rows=[_row(entry) for entry in content["metrics"].values()],
        scores=score_rows(content),
        no_total=missing_line(content),
        against=_against_rows(content),
        charts=list(_charts(content)),
        judged_by=None if judge is None else content["metrics"][judge]["title"],
        best=pairs[0],
        worst=pairs[1],
        markdown=markdown_row(content),
        latex=latex_row(content),
    )


def evaluation_lines(content: Mapping[str, Any]) -> list[str]:
    """The table as lines of text, for a terminal."""
    label = content["reference"]["label"] if content["reference"] else ""
    lines = [f"{content['model']['label']}, {content['num_videos']} videos of {content['num_prompts']} prompts"]
    for entry in content["metrics"].values():
        row = _row(entry)
        beside = f"   {label} {row.reference}" if row.reference else ""
        lines.append(f"  {row.heading:<44} {row.value}{beside}{f'   {row.change}' if row.change else ''}")
        lines += [f"    {row.note}"] if row.note else []
    for score in score_rows(content):
        beside = f"   {label} {score.reference_text}" if score.reference_text else ""
        lines.append(f"  {score.heading:<44} {score.text}{beside}")
    lines += [f"  {line}" for line in [missing_line(content)] if line is not None]
    for row in _against_rows(content):
        lines.append(f"  against {content['against']['label']}: {row.heading:<30} {row.value}   {row.change}")
    return [*lines, *(f"  skipped: {name}: {reason}" for name, reason in content["skipped"].items())]


def _row(entry: Mapping[str, Any]) -> MetricRow:
    change = entry.get("difference")
    low, high = entry["range"]
    about = f"{entry['source']}; from {low} to {high}; better: {entry['better']}"
    if entry["blind_to"]:
        about += f"; blind to {', '.join(entry['blind_to'])}"
    return MetricRow(
        heading=heading(entry),
        value=with_interval(entry),
        reference=with_interval(entry["reference"]) if "reference" in entry else "",
        change="" if change is None else change_words(change),
        num_videos=entry["num_videos"],
        about=about,
        note=entry.get("warning", ""),
    )


def change_words(change: Mapping[str, Any]) -> str:
    """Whether a difference is more than noise, in words.

    >>> change_words({"p": 0.01, "is_settled": True, "videos_to_settle": 20})
    'differs (p = 0.0100)'
    >>> change_words({"p": 0.4, "is_settled": False, "videos_to_settle": 900})
    'not more than noise (p = 0.400); 900 videos would tell'
    """
    if change["p"] is None:
        return "one video alone says nothing"
    p = f"p = {format_number(change['p'])}"
    if change["is_settled"]:
        return f"differs ({p})"
    number = change["videos_to_settle"]
    return f"not more than noise ({p}){'' if number is None else f'; {number} videos would tell'}"


def _against_rows(content: Mapping[str, Any]) -> list[MetricRow]:
    """The differences from another model's evaluation."""
    rows = []
    for name, change in content.get("against", {"metrics": {}})["metrics"].items():
        entry = content["metrics"][name]
        rows.append(
            MetricRow(
                heading=heading(entry),
                value=with_interval(change),
                reference="",
                change=change_words(change),
                num_videos=change["num_videos"],
                about="",
                note="",
            )
        )
    return rows


def shown_videos(
    content: Mapping[str, Any],
) -> tuple[str | None, list[Mapping[str, Any]], list[Mapping[str, Any]]]:
    """The metric that decides which videos are shown, the best ones and the worst ones, the worst first."""
    judge, ordered = _ordered(content)
    return judge, ordered[:NUM_PAIRS], ordered[NUM_PAIRS:][-NUM_PAIRS:][::-1]


def _ordered(content: Mapping[str, Any]) -> tuple[str | None, list[Mapping[str, Any]]]:
    """The metric by which pairs are best or worst, and the videos from best to worst: the first that compares pairs."""
    for name, entry in content["metrics"].items():
        values = [video for video in content["videos"] if name in video["values"]]
        if entry["paired"] and entry["better"] != "neither" and len(values) == len(content["videos"]):
            sign = -1 if entry["better"] == "higher" else 1
            return name, sorted(values, key=lambda video: sign * video["values"][name])
    return None, list(content["videos"])


def _pair(
    video: Mapping[str, Any], judge: str | None, content: Mapping[str, Any], *, frames: Frames, fps: float
) -> ShownPair:
    ours, theirs = frames(video["name"])
    entry = content["metrics"].get(judge, {})
    value = "" if judge is None else f"{entry['title']} {format_number(video['values'][judge])} {entry['unit']}".strip()
    tiles = []
    if theirs is not None:
        label = content["reference"]["label"]
        tiles.append(shown_video(theirs.numpy(), label=label, fps=fps, psnr_db=None, note="reference"))
    tiles.append(shown_video(ours.numpy(), label=content["model"]["label"], fps=fps, psnr_db=None, note=value))
    seed = "" if video["seed"] is None else f", seed {video['seed']}"
    return ShownPair(
        caption=f"{video['caption'] or video['name']}{seed if video['caption'] else ''}", tiles=tuple(tiles)
    )


def _charts(content: Mapping[str, Any]) -> Iterator[Chart]:
    """For each metric its values by prompt, from the smallest mean to the largest: each video a dot, each mean a bar."""
    for name, entry in content["metrics"].items():
        rows: dict[int, list[float]] = {}
        for video in content["videos"]:
            if name in video["values"]:
                rows.setdefault(video["prompt"], []).append(video["values"][name])
        if len(rows) > 1:
            yield _draw(heading(entry), sorted(rows.values(), key=lambda row: sum(row) / len(row)))


def _draw(title: str, rows: Sequence[Sequence[float]]) -> Chart:
    places = np.concatenate([np.full(len(row), place) for place, row in enumerate(rows, 1)])
    with Canvas(title, last_step=len(rows) + 1) as canvas:
        canvas.axes.set_xlabel("prompts, by their mean")
        canvas.axes.plot(places, np.concatenate([np.asarray(row) for row in rows]), "o", color=FIRST, markersize=2.5)
        means = [sum(row) / len(row) for row in rows]
        canvas.axes.plot(range(1, len(rows) + 1), means, "_", color=SECOND, markersize=9, markeredgewidth=1.6)
        return canvas.chart("Each dot a video, each bar a prompt's mean.")
