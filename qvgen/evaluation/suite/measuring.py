"""One case measured by all metrics that look at videos: its values, the reference's, and the features of both."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from qvgen.errors import UserError
from qvgen.evaluation.metrics.base import Clip, Metric, Pair, SetMetric, VideoMetric
from qvgen.evaluation.suite.case import Case


def measure_case(
    metrics: Mapping[str, Metric], case: Case, *, video: Tensor, reference: Tensor | None
) -> dict[str, dict[str, Any]]:
    """Measure one video beside the reference's.

    Args:
        metrics: By name; those of the model itself are left out.
        case: Which video.
        video: uint8 [F, H, W, 3].
        reference: The reference's of the same case; None: there is none, and metrics that compare are left out.

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
    for name, metric in metrics.items():
        if isinstance(metric, SetMetric) and theirs is not None:
            for key, clip in (("features", ours), ("reference_features", theirs)):
                found[key][name] = metric.features(clip).tolist()
        elif isinstance(metric, VideoMetric) and metric.paired and theirs is not None:
            pair = Pair(video=ours, reference=theirs, caption=case.caption)
            found["values"][name] = _finite(metric.measure(pair), case=case, name=name)
        elif isinstance(metric, VideoMetric) and not metric.paired:
            for key, clip_ in (("values", ours), ("reference_values", theirs)):
                if clip_ is not None:
                    alone = Pair(video=clip_, reference=None, caption=case.caption)
                    found[key][name] = _finite(metric.measure(alone), case=case, name=name)
    return found


def _finite(value: float, *, case: Case, name: str) -> float:
    if not math.isfinite(value):
        raise UserError(f"{case.name}: {name} is {value}; look at the video, or leave the metric out (suite.metrics)")
    return float(value)


def _shape(video: Tensor) -> str:
    frames, height, width = video.shape[:3]
    return f"{frames} frames of {width}x{height}"
