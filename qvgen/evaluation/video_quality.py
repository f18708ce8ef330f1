"""Metrics of generated videos beside the teacher's of the same captions and seeds: rows of the report's table.

The metrics are those of suite=fast that compare single videos, so that a report and `qvgen evaluate` say the same of the same
videos. One that can't be measured here has its reason in its place: weights that `qvgen assets` would fetch, or a network
that would take a CPU longer than the rest of the report.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qvgen.config.leaves import load_leaf
from qvgen.evaluation.classifier import ATTRIBUTES, VIDEO_SHAPE, load_classifier
from qvgen.evaluation.distance import flicker
from qvgen.evaluation.metrics.base import Clip, Pair, VideoMetric
from qvgen.evaluation.quality_data import VariantQuality

STILL = "standing still"
SUITE = "fast"


@dataclass(frozen=True, kw_only=True)
class ReportMetrics:
    """The metrics of a report.

    Attributes:
        usable: The metrics that are measured, by the name that a report gives them: the leaf's, and its unit (``psnr_db``).
        titles: Title of each one that compares single videos, in the suite's order.
        left_out: Why one of ``titles`` is not measured, by its name.
    """

    usable: Mapping[str, VideoMetric]
    titles: Mapping[str, str]
    left_out: Mapping[str, str]


def open_metrics(videos: Tensor) -> ReportMetrics:
    """The metrics that can measure such videos here.

    Args:
        videos: uint8 [B, F, H, W, 3], the teacher's.
    """
    usable, titles, left_out = {}, {}, {}
    for leaf in load_leaf("suite", SUITE).metrics:
        metric = load_leaf("metric", leaf)
        if isinstance(metric, VideoMetric) and metric.paired:
            name = f"{leaf}_{metric.unit.lower()}" if metric.unit == "dB" else leaf
            titles[name], why = metric.title, _why_not(metric, videos)
            if why is None:
                usable[name] = metric
            else:
                left_out[name] = why
    return ReportMetrics(usable=usable, titles=titles, left_out=left_out)


def _why_not(metric: VideoMetric, videos: Tensor) -> str | None:
    """Why a metric is left out of a report; None: it is measured."""
    if metric.slow_on_cpu and not torch.cuda.is_available():
        return "a CPU takes seconds for each video; `qvgen evaluate run_dir=RUN` measures it"
    if (absent := metric.absent()) is not None:
        return absent
    first = Clip(videos[0, :2])
    try:
        metric.measure(Pair(video=first, reference=first, caption=None))
    except (ValueError, OSError) as error:  # damaged weights, or videos of one frame or a few pixels
        return str(error)
    return None


def video_quality(
    name: str,
    videos: Tensor,
    *,
    teacher: Tensor,
    items: Sequence[Mapping[str, Any]],
    metrics: Mapping[str, VideoMetric],
) -> VariantQuality:
    """Measure the row of one variant.

    Args:
        name: Name of the variant.
        videos: uint8 [B, F, H, W, 3], one for each item.
        teacher: Videos of the full-precision model, of the same shape.
        items: The request of each video: its caption, and attributes where the data has them.
        metrics: Metrics beside the teacher's videos; the value is the mean over videos.
    """
    still = [index for index, item in enumerate(items) if STILL in item["caption"]]
    return VariantQuality(
        name=name,
        compared=_means(videos, teacher, metrics) if name != "teacher" else {},
        flicker=flicker(videos[still]) if still and videos.shape[1] > 1 else None,
        accuracy=_accuracy(videos, items),
    )


def _means(videos: Tensor, teacher: Tensor, metrics: Mapping[str, VideoMetric]) -> dict[str, float]:
    values: dict[str, list[float]] = {name: [] for name in metrics}
    for ours, theirs in zip(videos, teacher, strict=True):
        pair = Pair(video=Clip(ours), reference=Clip(theirs), caption=None)
        for name, metric in metrics.items():
            value = metric.measure(pair)
            assert value is not None, f"{name} compares any two videos"
            values[name].append(value)
    return {name: math.fsum(found) / len(found) for name, found in values.items()}


def _accuracy(videos: Tensor, items: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Share of the videos that show what was asked for; empty for data without labels, or of another size."""
    if not all(name in items[0] for name in ATTRIBUTES) or tuple(videos.shape[1:]) != VIDEO_SHAPE:
        return {}
    return load_classifier().accuracy(videos, attribute_labels(items))


def attribute_labels(items: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """The classes that the captions ask for, int64 [B] by attribute."""
    return {name: torch.tensor([int(item[name]) for item in items]) for name in ATTRIBUTES}
