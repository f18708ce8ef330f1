"""Results of an evaluation in a model card, each with its interval; of the packed model's own evaluation and no other.

What is read is evaluation.json, as `qvgen evaluate` writes it (docs/evaluation.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qvgen.config.plain_json import read_json
from qvgen.deploy.manifest import Manifest
from qvgen.errors import UserError

EVALUATION_FILE = "evaluation.json"
FORMAT, VERSION = "qvgen-evaluation", 1


def read_card_evaluation(file: Path, packed: Path, manifest: Manifest) -> Mapping[str, Any]:
    """The evaluation of a packed folder.

    Args:
        file: evaluation.json, or the folder that it lies in.
        packed: The packed folder.
        manifest: Its manifest.

    Raises:
        UserError: There is none, or it is of another model.
    """
    source = file / EVALUATION_FILE if file.is_dir() else file
    content = read_json(source)
    if not isinstance(content, dict) or (content.get("format"), content.get("version")) != (FORMAT, VERSION):
        raise UserError(f"{source} is no evaluation; give the folder that `qvgen evaluate packed={packed}` wrote")
    model, metrics = content.get("model"), content.get("metrics")
    if not isinstance(model, dict) or not isinstance(metrics, dict):
        raise UserError(f"{source} is damaged: it lacks its model or its metrics; evaluate again")
    if manifest.sha256 not in (model.get("sha256") or ()):
        raise UserError(
            f"{source} is the evaluation of another model ({model.get('label')}) than {packed}; give the one that "
            f"`qvgen evaluate packed={packed}` wrote"
        )
    return content


def evaluated_text(content: Mapping[str, Any] | None) -> str:
    """A row for each metric: value and interval, the full-precision model's where it has one, and whether they differ."""
    if content is None:
        return "Not evaluated: `qvgen evaluate packed=FOLDER` does it, with intervals."
    metrics = [metric for metric in content["metrics"].values() if isinstance(metric, dict)]
    rows, compared = [_row(metric) for metric in metrics], any(metric.get("reference") for metric in metrics)
    head = ["metric", "better", "this model", *(["full precision", "differs"] if compared else []), "videos"]
    lines = [head, ["---"] * len(head), *(row if compared else [*row[:3], row[5]] for row in rows)]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    reference = (content.get("reference") or {}).get("label")
    share = (content.get("intervals") or {}).get("confidence")
    text = f"{content.get('num_videos')} videos of {content.get('num_prompts')} prompts (suite {content.get('suite')})"
    text += f", beside {reference}." if reference else "."
    text += f" In brackets: the interval of {100 * share:g} % over prompts." if isinstance(share, float) else ""
    warnings = [f"{metric.get('title')}: {metric['warning']}." for metric in metrics if metric.get("warning")]
    return "\n\n".join([table, text, *warnings])


def _row(metric: Mapping[str, Any]) -> list[str]:
    difference = metric.get("difference") or {}
    settled = {True: "yes", False: "no more than noise"}.get(difference.get("is_settled"), "")
    unit = f" in {metric['unit']}" if metric.get("unit") else ""
    cells = [
        f"{metric.get('title')}{unit}",
        str(metric.get("better")),
        _estimate(metric),
        _estimate(metric.get("reference")),
    ]
    return [*(cell.replace("|", "\\|") for cell in cells), settled, str(metric.get("num_videos"))]


def _estimate(found: Mapping[str, Any] | None) -> str:
    """A value with its interval; nothing where there is none."""
    if not found or found.get("value") is None:
        return ""
    ends = [found.get("low"), found.get("high")]
    return _number(found["value"]) + (f" [{_number(ends[0])}, {_number(ends[1])}]" if None not in ends else "")


def _number(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else str(value)
