"""The report's section "While training": how the same prompts looked at a few steps, and the PSNR of all of them.

The videos are read from the run's folder; see :mod:`qvgen.evaluation.validation_files`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np

from qvgen.data.video_reader import read_video
from qvgen.evaluation.report.canvas import FIRST, TEXT, Canvas, Chart
from qvgen.evaluation.report.embedded_video import ShownVideo, shown_video
from qvgen.evaluation.report.page_format import format_number
from qvgen.evaluation.report_data import ValidationVideo

MOST_STEPS = 5
"""Most videos of the student that a prompt's row shows: all of them are inside of the page."""


@dataclass(frozen=True, kw_only=True)
class ShownPrompt:
    """One prompt's row: the teacher, if there is one, then the student at a few steps."""

    prompt: str
    seed: int
    tiles: tuple[ShownVideo, ...]


@dataclass(frozen=True, kw_only=True)
class SuiteTable:
    """The means of the suite's metrics over the prompts.

    Attributes:
        names: The metrics' names.
        rows: Each shown step and its values, a dash where a metric has none.
    """

    names: tuple[str, ...]
    rows: tuple[tuple[int, tuple[str, ...]], ...]


@dataclass(frozen=True, kw_only=True)
class ValidationSection:
    """The content of the section.

    Attributes:
        prompts: one row each.
        num_steps: at how many steps videos were made.
        shown_steps: the steps whose videos are shown.
        chart: PSNR over the steps; None where there is nothing to draw.
        suite: values of the metrics of evaluation.suite, a row for each shown step; None where there are none.
    """

    prompts: tuple[ShownPrompt, ...]
    num_steps: int
    shown_steps: tuple[int, ...]
    chart: Chart | None
    suite: SuiteTable | None


def build_section(videos: Sequence[ValidationVideo], *, last_step: int) -> ValidationSection | None:
    """Make the section of a run's validation videos; None where there are none.

    Args:
        videos: all of the run, in order of step and prompt.
        last_step: optimizer steps of the run, where the curve's axis ends.

    Raises:
        ValueError: a video cannot be decoded.
    """
    if not videos:
        return None
    steps = sorted({video.step for video in videos})
    shown = choose_steps(steps)
    indices = sorted({video.prompt_index for video in videos})
    return ValidationSection(
        prompts=tuple(
            _shown_prompt([video for video in videos if video.prompt_index == index], shown) for index in indices
        ),
        num_steps=len(steps),
        shown_steps=shown,
        chart=draw_psnr(videos, last_step=last_step),
        suite=_suite_table(videos, shown),
    )


def _suite_table(videos: Sequence[ValidationVideo], steps: Sequence[int]) -> SuiteTable | None:
    names = tuple(dict.fromkeys(name for video in videos for name in video.suite))

    def mean(step: int, name: str) -> str:
        values = [video.suite[name] for video in videos if video.step == step and name in video.suite]
        return format_number(fmean(values) if values else None)

    rows = tuple((step, tuple(mean(step, name) for name in names)) for step in steps)
    return SuiteTable(names=names, rows=rows) if names else None


def choose_steps(steps: Sequence[int]) -> tuple[int, ...]:
    """At most ``MOST_STEPS`` of the steps, evenly over their list, the first and the last among them.

    >>> choose_steps(range(0, 2250, 250))
    (0, 500, 1000, 1500, 2000)
    >>> choose_steps([0, 250, 300])
    (0, 250, 300)
    """
    count = min(len(steps), MOST_STEPS)
    return tuple(steps[round(index)] for index in np.linspace(0, len(steps) - 1, count))


def _shown_prompt(videos: Sequence[ValidationVideo], steps: Sequence[int]) -> ShownPrompt:
    first = videos[0]
    tiles = []
    if first.teacher is not None:
        tiles.append(shown_video(read_video(first.teacher), label="Teacher", fps=first.fps, psnr_db=None))
    for video in videos:
        if video.step in steps:
            frames = read_video(video.student)
            tiles.append(shown_video(frames, label=f"Step {video.step}", fps=video.fps, psnr_db=video.psnr_db))
    return ShownPrompt(prompt=first.prompt, seed=first.seed, tiles=tuple(tiles))


def draw_psnr(videos: Sequence[ValidationVideo], *, last_step: int) -> Chart | None:
    """PSNR of the student's videos over the steps: each prompt thin, their mean thick; None without a finite one.

    The PSNR of equal videos is infinite and stands on no axis: it is left out, and so is that step of the mean.
    """
    steps = sorted({video.step for video in videos})
    indices = sorted({video.prompt_index for video in videos})
    values = np.full((len(indices), len(steps)), np.nan)
    for video in videos:
        if video.psnr_db is not None and np.isfinite(video.psnr_db):
            values[indices.index(video.prompt_index), steps.index(video.step)] = video.psnr_db
    if not np.isfinite(values).any():
        return None
    with Canvas("PSNR of the student's videos to the teacher's, dB", last_step=last_step) as canvas:
        for row in values:
            canvas.axes.plot(steps, row, color=TEXT, linewidth=0.7, alpha=0.6)
        canvas.axes.plot(
            steps, values.mean(axis=0), color=FIRST, linewidth=1.8, marker="o", markersize=3, clip_on=False
        )
        return canvas.chart(f"Thin: each of {len(indices)} prompts. Thick: their mean.")
