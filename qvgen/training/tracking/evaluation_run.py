"""An evaluation at Weights & Biases: a run of its own that uses the packed folder which the training's run made.

    training's run  ->  packed-ID (type model)  ->  evaluation's run  ->  evaluation-ID (type evaluation)

Its numbers stand in the summary under ``evaluation/``, its table and the best and the worst pairs as videos under ``eval/``.
The same folder is continued as the same run. As with a training, nothing that the service does costs the evaluation anything:
it is written before.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qvgen.config.run_config import read_config
from qvgen.config.schema.sections import LoggerConfig
from qvgen.data.video import write_video
from qvgen.evaluation.report.evaluation_page import Frames, shown_videos
from qvgen.training.run_label import RunLabel, logged_as
from qvgen.training.tracking.report_panels import flat_numbers, packed_artifact
from qvgen.training.tracking.service import first_line
from qvgen.training.tracking.wandb_run import open_run

log = logging.getLogger(__name__)

FILES = ("evaluation.json", "evaluation.html", "evaluation.md", "evaluation.tex", "evaluation.csv")
SHOWN = "shown"
"""Folder of the mp4 files of the pairs, in the evaluation's folder."""

_COLUMNS = ("value", "low", "high")


def log_evaluation(out: Path, content: Mapping[str, Any], *, training: Path, frames: Frames, fps: float) -> None:
    """Log an evaluation that is written; a warning where that can't be done.

    Args:
        out: Its folder.
        content: What evaluation.json holds.
        training: Folder of the training whose packed model it is of, which was logged.
        frames: Reads the videos that are shown.
        fps: Their frames per second.
    """
    try:
        record, section = logged_as(training), read_config(training)["logger"]
        report = json.loads((training / "report.json").read_text(encoding="utf-8"))
        logger = LoggerConfig(
            name="wandb",
            project=section["project"],
            group=record["group"],
            tags=(),
            upload=section["upload"],
            further=(),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("the evaluation is not logged at wandb: %s tells no run (%s)", training, first_line(error))
        return
    settings = {key: content[key] for key in ("suite", "settings", "num_videos", "num_prompts")}
    label = RunLabel(
        name=f"{record['name']}, evaluation",
        tags=("evaluation", str(content["suite"])),
        settings={**settings, "training": record["id"]},
        job_type="evaluation",
    )
    run = open_run(logger, out, label)
    if run is None:
        return
    try:
        run.attempt(lambda opened: _log_tables(opened, out, content, frames=frames, fps=fps))
        if logger.upload != "nothing":
            packed = {"training": record["id"], "whole": logger.upload == "packed"}
            run.attempt(lambda opened: _log_files(opened, out, content, packed_artifact(training, report, **packed)))
    finally:
        run.finish()


def _log_tables(run: Any, out: Path, content: Mapping[str, Any], *, frames: Frames, fps: float) -> None:
    import wandb

    run.summary.update(flat_numbers(content["metrics"], prefix="evaluation"))
    rows = [_metric_row(entry) for entry in content["metrics"].values()]
    columns = ["metric", "unit", "better", *_COLUMNS, "videos", *(f"reference {name}" for name in _COLUMNS), "p"]
    run.log({"eval/metrics": wandb.Table(columns=columns, data=rows)})
    _, best, worst = shown_videos(content)
    names = list(content["metrics"])
    pairs = []
    for kind, videos in (("best", best), ("worst", worst)):
        for video in videos:
            shown = [_file(out, video["name"], side, part, fps=fps) for side, part in _sides(frames(video["name"]))]
            cells = [None if path is None else wandb.Video(str(path), format="mp4") for path in shown]
            values = [video["values"].get(name) for name in names]
            pairs.append([kind, video["caption"] or video["name"], video["seed"], *cells, *values])
    columns = ["kind", "prompt", "seed", "reference", "model", *names]
    run.log({"eval/pairs": wandb.Table(columns=columns, data=pairs)})


def _metric_row(entry: Mapping[str, Any]) -> list[Any]:
    reference, difference = entry.get("reference", {}), entry.get("difference", {})
    return [
        entry["title"], entry["unit"], entry["better"], *(entry[name] for name in _COLUMNS), entry["num_videos"],
        *(reference.get(name) for name in _COLUMNS), difference.get("p"),
    ]  # fmt: skip


def _sides(pair: tuple[Any, Any]) -> list[tuple[str, Any]]:
    ours, theirs = pair
    return [("reference", theirs), ("model", ours)]


def _file(out: Path, name: str, side: str, frames: Any, *, fps: float) -> Path | None:
    """The mp4 of a video, written; None where there is none."""
    if frames is None:
        return None
    path = out / SHOWN / f"{name}-{side}.mp4"
    path.parent.mkdir(exist_ok=True)
    write_video(path, frames.numpy(), fps=fps)
    return path


def _log_files(run: Any, out: Path, content: Mapping[str, Any], packed: Any) -> None:
    """Say which packed folder is used and what came of it, so that the service shows the way from the training."""
    import wandb

    # run.use_artifact refuses to work offline; for a new artifact it does this and waits for the server.
    run._log_artifact(packed, is_user_created=True, use_after_commit=True)
    values = {name: entry["value"] for name, entry in content["metrics"].items()}
    result = wandb.Artifact(f"evaluation-{run.id}", type="evaluation", metadata={"suite": content["suite"], **values})
    for name in FILES:
        result.add_file(str(out / name))
    run.log_artifact(result)
