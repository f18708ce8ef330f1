"""A finished run on its page at Weights & Biases: numbers, videos side by side, and files with the run they are of."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from qvgen.evaluation.comparison import VARIANTS, video_name

REPORT_FILES = ("report.html", "report.json")

Uploaded = Literal["nothing", "report", "packed"]


def log_report(run: Any, run_dir: Path, *, upload: Uploaded) -> None:
    """Log what a finished run left in its folder.

    Args:
        run: wandb's.
        run_dir: The folder, with report.json.
        upload: ``report`` sends the report and the checksums of the packed files, ``packed`` those files too, ``nothing``
            sends numbers and videos alone.
    """
    report = json.loads((run_dir / "report.json").read_text(encoding="utf-8"))
    run.summary.update(flat_numbers(report))
    table = _video_table(report.get("videos", []), run_dir / "videos")
    if table is not None:
        run.log({"eval/videos": table})
    if upload != "nothing":
        _log_files(run, run_dir, report, whole=upload == "packed")


def _video_table(videos: list[Mapping[str, Any]], folder: Path) -> Any | None:
    """The report's videos, a row for each prompt and a column for each model; None where no file is there."""
    import wandb

    rows, shown = [], [variant for variant in VARIANTS if any(folder.glob(f"*-{variant}.mp4"))]
    for index, video in enumerate(videos):
        paths = [folder / video_name(index, video["prompt"], seed=video["seed"], variant=name) for name in shown]
        cells = [wandb.Video(str(path), format="mp4") if path.is_file() else None for path in paths]
        rows.append([video["prompt"], video["seed"], *cells])
    return wandb.Table(columns=["prompt", "seed", *shown], data=rows) if rows and shown else None


def _log_files(run: Any, run_dir: Path, report: Mapping[str, Any], *, whole: bool) -> None:
    """Log the packed folder and the report as artifacts, so that the service shows which run each is of."""
    import wandb

    facts = _facts(report)
    if (run_dir / "packed").is_dir():
        run.log_artifact(packed_artifact(run_dir, report, training=run.id, whole=whole))
    page = wandb.Artifact(f"report-{run.id}", type="report", metadata={**facts, **report.get("relative_error", {})})
    for name in REPORT_FILES:
        if (run_dir / name).is_file():
            page.add_file(str(run_dir / name))
    run.log_artifact(page)


def packed_artifact(run_dir: Path, report: Mapping[str, Any], *, training: str, whole: bool) -> Any:
    """The packed folder as an artifact; equal files make the same version of it, whichever run names them.

    Args:
        run_dir: The training's folder.
        report: Its report.json.
        training: Id of its run.
        whole: Whether the files are sent, and not their names and checksums alone.
    """
    import wandb

    packed = run_dir / "packed"
    model = wandb.Artifact(f"packed-{training}", type="model", metadata=_facts(report))
    if whole:
        model.add_dir(str(packed))
    else:
        for path in sorted(packed.iterdir()):  # a folder as one would be announced on stderr
            model.add_reference(path.resolve().as_uri(), name=path.name)
    return model


def _facts(report: Mapping[str, Any]) -> dict[str, Any]:
    return {key: report.get(key) for key in ("model", "bits", "profile", "method", "init", "seed", "steps")}


def flat_numbers(content: Any, prefix: str = "report") -> dict[str, float | bool]:
    """Every number in a report: ``a/b`` for ``{"a": {"b": 1}}``; entries of a list by their name, or their place.

    Example:
        >>> flat_numbers({"a": 1, "layers": [{"name": "to_q", "bytes": 8}], "seeds": [4], "b": {"c": "inf", "d": "text"}})
        {'report/a': 1, 'report/layers/to_q/bytes': 8, 'report/seeds/0': 4, 'report/b/c': inf}
    """
    if isinstance(content, Mapping):
        items = [(str(key), value) for key, value in content.items() if key != "name"]
    elif isinstance(content, list):
        keys = [str(entry.get("name", i)) if isinstance(entry, Mapping) else str(i) for i, entry in enumerate(content)]
        items = list(zip(keys, content, strict=True))
    elif isinstance(content, bool | int | float):
        return {prefix: content}
    elif content in ("inf", "-inf", "nan"):  # what JSON has no number for, see qvgen.evaluation.json_number
        return {prefix: float(content) if content != "nan" else math.nan}
    else:
        return {}
    return {key: value for name, entry in items for key, value in flat_numbers(entry, f"{prefix}/{name}").items()}
