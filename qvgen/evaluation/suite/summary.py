"""From the values of all videos to the content of evaluation.json: one entry for each metric, one for each video.

It is a function of what was measured and of nothing else: no time, no machine, no order of work.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from qvgen.errors import UserError
from qvgen.evaluation.json_number import json_number
from qvgen.evaluation.metrics.base import Metric, SetMetric
from qvgen.evaluation.suite.case import Case
from qvgen.evaluation.suite.statistics import CONFIDENCE, RESAMPLES, Difference, difference, estimate, set_estimate
from qvgen.evaluation.vbench.dimension import Dimension

FORMAT, VERSION = "qvgen-evaluation", 1


@dataclass(frozen=True, kw_only=True)
class MeasuredCase:
    """One case and what was found of it; see :func:`qvgen.evaluation.suite.measuring.measure_case`."""

    case: Case
    values: Mapping[str, float]
    reference_values: Mapping[str, float]
    features: Mapping[str, Sequence[float]]
    reference_features: Mapping[str, Sequence[float]]


def summarize(
    metrics: Mapping[str, Metric],
    cases: Sequence[MeasuredCase],
    *,
    skipped: Mapping[str, str],
    about: Mapping[str, Any],
) -> dict[str, Any]:
    """The content of evaluation.json.

    Args:
        metrics: The metrics that were measured, by name.
        cases: All videos.
        skipped: Name -> why it was not measured.
        about: What was compared, and how.
    """
    empty = {name: why for name, metric in metrics.items() if (why := _why_empty(name, metric, cases)) is not None}
    return {
        "format": FORMAT,
        "version": VERSION,
        **about,
        "num_videos": len(cases),
        "num_prompts": len({one.case.prompt for one in cases}),
        "intervals": {"confidence": CONFIDENCE, "resamples": RESAMPLES, "drawn": "prompts"},
        "metrics": {name: _entry(name, metric, cases) for name, metric in metrics.items() if name not in empty},
        "skipped": {**skipped, **empty},
        "videos": [_video(one) for one in cases],
    }


def _why_empty(name: str, metric: Metric, cases: Sequence[MeasuredCase]) -> str | None:
    """Why a metric has no value although it could be measured; None: it has one."""
    if isinstance(metric, SetMetric):
        return None if len(cases) > 1 else "it compares sets of videos, and there is one"
    if any(name in one.values for one in cases):
        return None
    if isinstance(metric, Dimension):
        return "no video has a value; the list of prompts (vbench.info) names none of their captions for it"
    return "no video has a value; of a prediction error: no sampling step lies in its band of noise"


def _entry(name: str, metric: Metric, cases: Sequence[MeasuredCase]) -> dict[str, Any]:
    facts = {
        "title": metric.title,
        "unit": metric.unit,
        "source": metric.source,
        "range": [json_number(metric.low), json_number(metric.high)],
        "better": metric.better,
        "paired": metric.paired,
        "blind_to": list(metric.blind_to),
        "weights": metric.weight_facts(),
    }
    if isinstance(metric, SetMetric):
        return {**facts, **_set_values(name, metric, cases)}
    measured = [one for one in cases if name in one.values]
    values, prompts = [one.values[name] for one in measured], [one.case.prompt for one in measured]
    found: dict[str, Any] = {"num_videos": len(measured), **asdict(estimate(values, prompts))}
    if measured and all(name in one.reference_values for one in measured):
        theirs = [one.reference_values[name] for one in measured]
        found["reference"] = asdict(estimate(theirs, prompts))
        found["difference"] = plain_difference(difference(values, theirs, prompts))
    return {**facts, **found}


def _set_values(name: str, metric: SetMetric, cases: Sequence[MeasuredCase]) -> dict[str, Any]:
    ours, theirs = (
        torch.tensor([list(rows[name]) for rows in column], dtype=torch.float64)
        for column in ([one.features for one in cases], [one.reference_features for one in cases])
    )

    def distance(chosen: Sequence[int]) -> float:
        rows = torch.tensor(list(chosen))
        return metric.distance(ours[rows], theirs[rows])

    found: dict[str, Any] = {
        "num_videos": len(cases),
        **asdict(set_estimate(distance, [one.case.prompt for one in cases])),
    }
    if len(cases) < metric.enough:
        found["warning"] = (
            f"{len(cases)} videos are fewer than {metric.enough}: its value depends on their number, and ranks no models"
        )
    return found


def plain_difference(found: Difference) -> dict[str, Any]:
    """A difference as JSON has it."""
    return {
        **asdict(found.estimate), "p": found.p, "is_settled": found.is_settled, "videos_to_settle": found.videos,
    }  # fmt: skip


def _video(one: MeasuredCase) -> dict[str, Any]:
    return {
        "name": one.case.name,
        "prompt": one.case.prompt,
        "caption": one.case.caption,
        "seed": one.case.seed,
        "values": dict(one.values),
        "reference_values": dict(one.reference_values),
    }


def read_evaluation(folder: Path, *, key: str) -> dict[str, Any]:
    """The content of a folder's evaluation.json.

    Raises:
        UserError: It is not there, or is no evaluation.
    """
    path = folder if folder.suffix == ".json" else folder / "evaluation.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT or content["version"] != VERSION:
            raise ValueError(f"it is {content['format']} {content['version']}")
        if not isinstance(content["metrics"], dict) or not isinstance(content["videos"], list):
            raise ValueError("it lacks metrics or videos")
    except OSError as error:
        raise UserError(f"{key}={folder} holds no evaluation: {path} can't be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{key}={folder} holds no evaluation of this version: {path}: {error}") from error
    found: dict[str, Any] = content
    return found


def against(content: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """How two evaluations differ, metric by metric, on the videos that both have: of one name, so of one prompt and noise.

    Args:
        content: One evaluation's content.
        other: The other's.

    Raises:
        UserError: They have no video in common.
    """
    theirs = {video["name"]: video for video in other["videos"]}
    both = [(video, theirs[video["name"]]) for video in content["videos"] if video["name"] in theirs]
    if not both:
        raise UserError("the two evaluations have no video in common; evaluate both on the same prompts and seeds")
    found = {}
    for name in content["metrics"]:
        rows = [(ours, its) for ours, its in both if name in ours["values"] and name in its["values"]]
        if rows:
            first, second = [ours["values"][name] for ours, _ in rows], [its["values"][name] for _, its in rows]
            prompts = [ours["prompt"] for ours, _ in rows]
            found[name] = {"num_videos": len(rows), **plain_difference(difference(first, second, prompts))}
    return found
