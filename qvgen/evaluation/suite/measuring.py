"""One case measured by all metrics that look at videos: its values, the reference's, and the features of both."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from qvgen.errors import UserError
from qvgen.evaluation.metrics.base import Clip, Metric, Pair, SetMetric, VideoMetric
from qvgen.evaluation.prompt_list import PromptList
from qvgen.evaluation.suite.case import Case


def measure_case(
    metrics: Mapping[str, Metric],
    case: Case,
    *,
    video: Tensor,
    reference: Tensor | None,
    fps: float | None = None,
    prompts: PromptList | None = None,
) -> dict[str, dict[str, Any]]:
    """Measure one video beside the reference's.

    Args:
        metrics: By name; those of the model itself are left out.
        case: Which video.
        video: uint8 [F, H, W, 3].
        reference: The reference's of the same case; None: there is none, and metrics that compare are left out.
        fps: Frames per second of both; None: nobody said it.
        prompts: The list that says which prompts a dimension looks at; None: there is none.

    Returns:
        ``values`` and ``features`` by metric, and ``reference_values`` of the metrics that compare nothing, and
        ``reference_features``.

    Raises:
        UserError: The two have other shapes, or a value is not finite; with the case's name.
    """
    if reference is not None and video.shape != reference.shape:
        raise UserError(
            f"{case.name}: the video is {_shape(video)} and the reference {_shape(reference)}; compare videos of one shape"
        )
    ours, theirs = Clip(video), None if reference is None else Clip(reference)
    found: dict[str, dict[str, Any]] = {
        "values": {}, "reference_values": {}, "features": {}, "reference_features": {},
    }  # fmt: skip
    known: dict[str, Any] = {
        "caption": case.caption, "fps": fps, "has_prompt_list": prompts is not None,
        "prompt": None if prompts is None else prompts.facts(case.caption),
    }  # fmt: skip
    for name, metric in metrics.items():
        if isinstance(metric, SetMetric) and theirs is not None:
            for key, clip in (("features", ours), ("reference_features", theirs)):
                found[key][name] = metric.features(clip).tolist()
        elif isinstance(metric, VideoMetric) and metric.paired and theirs is not None:
            found["values"].update(_value(name, metric, Pair(video=ours, reference=theirs, **known), case=case))
        elif isinstance(metric, VideoMetric) and not metric.paired:
            for key, clip_ in (("values", ours), ("reference_values", theirs)):
                if clip_ is not None:
                    found[key].update(_value(name, metric, Pair(video=clip_, reference=None, **known), case=case))
    return found


def _value(name: str, metric: VideoMetric, pair: Pair, *, case: Case) -> dict[str, float]:
    """The value of one video by its metric's name; empty where the metric does not concern it or gives it none."""
    value = metric.measure(pair) if metric.concerns(pair) else None
    if value is None:
        return {}
    if not math.isfinite(value):
        raise UserError(f"{case.name}: {name} is {value}; look at the video, or leave the metric out (suite.metrics)")
    return {name: float(value)}


def _shape(video: Tensor) -> str:
    frames, height, width = video.shape[:3]
    return f"{frames} frames of {width}x{height}"
