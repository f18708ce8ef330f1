"""Validation videos at Weights & Biases: a panel for each prompt, and the means over the prompts."""

from __future__ import annotations

from statistics import fmean
from typing import Any

from qvgen.evaluation.report_data import ValidationVideo
from qvgen.evaluation.validation_files import ValidationFiles
from qvgen.training.tracking.sections import VIDEO_STEP


def log_videos(run: Any, files: ValidationFiles, videos: list[ValidationVideo], row: int) -> None:
    """One panel per prompt, and the means over the prompts; with a step of their own, because they may come late.

    Args:
        run: wandb's.
        files: Of the videos.
        videos: All of one step.
        row: Of the history, which they share with the metrics of an optimizer step; rows that are written are closed.
    """
    import wandb

    step = videos[0].step
    content: dict[str, Any] = {VIDEO_STEP: step}
    for video in videos:
        index, both = video.prompt_index, video.psnr_db is not None
        path = files.path(index, step=step, variant="side-by-side") if both else video.student
        caption = f"{video.prompt} (seed {video.seed}, step {step}{'; teacher, student' if both else ''})"
        content[f"video/{index:02d}"] = wandb.Video(str(path), format="mp4", caption=caption)
    for name in ("psnr_db", "ssim"):
        values = [value for video in videos if (value := getattr(video, name)) is not None]
        if values:
            content[f"video/{name}"] = fmean(values)
    for name in {name: None for video in videos for name in video.suite}:
        run.define_metric(f"eval/{name}", step_metric=VIDEO_STEP)
        content[f"eval/{name}"] = fmean(video.suite[name] for video in videos if name in video.suite)
    run.log(content, step=row)
