"""The sections of a run's page at Weights & Biases, and the axis of each.

    train     loss, gradient norms, learning rate           over optimizer steps
    phi       rank, gate, share of small singular values    over optimizer steps
    quant     clips of inputs; tables and pictures of all   over optimizer steps
              layers
    eval      held-out error; the report's videos           over optimizer steps
    system    clips per second, MFU, seconds                over optimizer steps
    video     validation videos, their PSNR and SSIM        over the step that they show, which may be written later
    report    every number of report.json                   in the summary alone

The service makes a section of what stands before a name's first slash. metrics.csv keeps the names of its columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

STEP = "trainer/global_step"
VIDEO_STEP = "video/step"
SECTIONS = ("train", "phi", "quant", "video", "eval", "system", "report")
"""In the order in which a workspace shows them."""

_MOVED = {"train/seconds": "system/seconds"}
_PREFIXES = {"clip/": "quant/clip_", "val/": "eval/"}


def panel_name(column: str) -> str:
    """The name that a column of metrics.csv has at the service.

    Example:
        >>> [panel_name(column) for column in ("train/loss", "train/seconds", "clip/low_t0", "val/relative_error")]
        ['train/loss', 'system/seconds', 'quant/clip_low_t0', 'eval/relative_error']
    """
    if column in _MOVED:
        return _MOVED[column]
    prefix = next((prefix for prefix in _PREFIXES if column.startswith(prefix)), "")
    return _PREFIXES.get(prefix, "") + column.removeprefix(prefix)


def panel_row(row: Mapping[str, float], *, step: int | None) -> dict[str, float]:
    """A row of metrics.csv as the service gets it, with the optimizer step as its axis."""
    named = {panel_name(column): value for column, value in row.items()}
    return named if step is None else {**named, STEP: step}


def define_sections(run: Any) -> None:
    """Tell wandb's run which numbers are drawn over which."""
    run.define_metric(STEP, hidden=True)
    run.define_metric(VIDEO_STEP, hidden=True)
    for section in SECTIONS:
        if section != "report":
            run.define_metric(f"{section}/*", step_metric=VIDEO_STEP if section == "video" else STEP)
