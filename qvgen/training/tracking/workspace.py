"""The workspace of a project at Weights & Biases: which panels stand in which section, for all runs of qvgen in it."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

from qvgen.errors import UserError
from qvgen.evaluation.report.heat_map import PICTURES
from qvgen.training.student_metrics import STUDENT_COLUMNS
from qvgen.training.tracking.layer_panels import TABLE
from qvgen.training.tracking.sections import SECTIONS, STEP, VIDEO_STEP, panel_name

NUM_VIDEOS = 8
"""Validation prompts that have a place in the section of videos."""


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One panel.

    Attributes:
        title: Its title.
        names: Names of the metrics, media or tables that it shows.
        kind: ``lines`` over steps, ``media`` with a slider of steps, a ``table`` of the run, or a ``number`` of each run.
        log: Whether the vertical axis of lines is logarithmic.
    """

    title: str
    names: tuple[str, ...]
    kind: str = "lines"
    log: bool = False


def _clips(side: str) -> tuple[str, ...]:
    return tuple(panel_name(column) for column in STUDENT_COLUMNS if column.startswith(f"clip/{side}_t"))


PANELS: dict[str, tuple[Panel, ...]] = {
    "train": (
        Panel(title="Training loss", names=("train/loss",), log=True),
        Panel(
            title="Gradient norm, before clipping: all, weights, Phi",
            names=("train/gradient_norm", "train/gradient_norm_weights", "train/gradient_norm_phi"),
            log=True,
        ),
        Panel(title="Learning rate", names=("train/learning_rate",)),
    ),
    "phi": (
        Panel(title="Rank of Phi", names=("phi/rank",)),
        Panel(title="Smallest gate of Phi's components", names=("phi/gamma_min",)),
        Panel(title="Share of singular values below a tenth of the largest", names=("phi/small_share",)),
    ),
    "quant": (
        Panel(title="Factor on the minimum of inputs, by timestep", names=_clips("low")),
        Panel(title="Factor on the maximum of inputs, by timestep", names=_clips("high")),
        *(Panel(title=title, names=(f"quant/{name}_by_layer",), kind="media") for name, title in PICTURES.items()),
        Panel(title="All layers", names=(TABLE,), kind="table"),
    ),
    "video": (
        Panel(
            title="Validation videos: teacher and student",
            names=tuple(f"video/{index:02d}" for index in range(NUM_VIDEOS)),
            kind="media",
        ),
        Panel(title="PSNR to the teacher's videos in dB", names=("video/psnr_db",)),
        Panel(title="SSIM to the teacher's videos", names=("video/ssim",)),
    ),
    "eval": (
        Panel(title="Held-out relative error", names=("eval/relative_error",), log=True),
        Panel(title="Held-out error of the packed model", names=("report/relative_error/packed",), kind="number"),
        Panel(title="Held-out error of the PTQ start", names=("report/relative_error/ptq",), kind="number"),
        Panel(title="Videos of the report, by model", names=("eval/videos",), kind="table"),
        Panel(title="Metrics of an evaluation, with intervals", names=("eval/metrics",), kind="table"),
        Panel(title="Best and worst pairs of an evaluation", names=("eval/pairs",), kind="table"),
    ),
    "system": (
        Panel(title="Clips per second", names=("system/clips_per_second",)),
        Panel(title="Tokens per second", names=("system/tokens_per_second",)),
        Panel(title="Seconds of a step", names=("system/step_seconds",)),
        Panel(title="Model FLOPs utilization (MFU)", names=("system/mfu",)),
        Panel(title="Seconds of training", names=("system/seconds",)),
        Panel(title="Bytes of the packed model", names=("report/bytes/packed",), kind="number"),
    ),
}
"""Section -> its panels, in their order."""


def workspace(*, entity: str, project: str, name: str) -> Any:
    """The workspace as an object of wandb-workspaces, not sent anywhere yet.

    Raises:
        UserError: The package is not installed.
    """
    workspaces, reports = _packages()
    sections = [
        workspaces.Section(
            name=section, panels=[_drawn(reports, panel, section=section) for panel in PANELS[section]], is_open=True
        )
        for section in SECTIONS
        if section in PANELS
    ]
    settings = workspaces.WorkspaceSettings(x_axis=STEP)
    return workspaces.Workspace(entity=entity, project=project, name=name, sections=sections, settings=settings)


def _packages() -> tuple[Any, Any]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # the package's own, which nobody here can act on
            import wandb_workspaces.reports.v2 as reports
            import wandb_workspaces.workspaces as workspaces
    except ImportError as error:
        raise UserError("the package wandb-workspaces is not installed; run `pip install wandb-workspaces`") from error
    return workspaces, reports


def _drawn(reports: Any, panel: Panel, *, section: str) -> Any:
    """A panel as an object of wandb-workspaces."""
    names = list(panel.names)
    if panel.kind == "media":
        return reports.MediaBrowser(title=panel.title, media_keys=names, num_columns=min(2, len(names)))
    if panel.kind == "table":
        return reports.WeavePanelSummaryTable(table_name=names[0])
    if panel.kind == "number":
        return reports.BarPlot(title=panel.title, metrics=[reports.SummaryMetric(name) for name in names])
    axis = VIDEO_STEP if section == "video" else STEP
    return reports.LinePlot(title=panel.title, x=axis, y=names, log_y=panel.log or None)
