"""VBench's normalization and its three weighted scores, as published (scripts/constant.py and cal_final_score.py).

    normalized   (value - low) / (high - low), with the published ends of each dimension
    quality      weighted mean of the seven dimensions of quality; dynamic degree has weight 1/2, the others 1
    semantic     mean of the nine others
    total        (4 quality + semantic) / 5

The published program counts a dimension that was not measured as a value of 0. Here a score is there where all its dimensions
are, and is missing otherwise: part of a mean would be taken for the whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

QUALITY: Mapping[str, tuple[float, float, float]] = {
    "subject_consistency": (0.1462, 1.0, 1.0),
    "background_consistency": (0.2615, 1.0, 1.0),
    "temporal_flickering": (0.6293, 1.0, 1.0),
    "motion_smoothness": (0.706, 0.9975, 1.0),
    "aesthetic_quality": (0.0, 1.0, 1.0),
    "imaging_quality": (0.0, 1.0, 1.0),
    "dynamic_degree": (0.0, 1.0, 0.5),
}
"""Dimension -> low, high, weight."""

SEMANTIC: Mapping[str, tuple[float, float, float]] = {
    "object_class": (0.0, 1.0, 1.0),
    "multiple_objects": (0.0, 1.0, 1.0),
    "human_action": (0.0, 1.0, 1.0),
    "color": (0.0, 1.0, 1.0),
    "spatial_relationship": (0.0, 1.0, 1.0),
    "scene": (0.0, 0.8222, 1.0),
    "appearance_style": (0.0009, 0.2855, 1.0),
    "temporal_style": (0.0, 0.364, 1.0),
    "overall_consistency": (0.0, 0.364, 1.0),
}
"""Dimension -> low, high, weight."""

QUALITY_WEIGHT, SEMANTIC_WEIGHT = 4, 1


def scores(values: Mapping[str, float]) -> dict[str, Any]:
    """The normalized dimensions and the scores.

    Args:
        values: Dimension -> its mean over all videos; other names are left out.

    Returns:
        ``normalized`` by dimension, ``quality``, ``semantic`` and ``total``, None where a dimension of theirs is missing, and
        the names of those, ``missing``.

    >>> scores({"scene": 0.4111})["normalized"]
    {'scene': 0.5}
    """
    every = {**QUALITY, **SEMANTIC}
    normalized = {name: (values[name] - low) / (high - low) for name, (low, high, _) in every.items() if name in values}
    quality, semantic = (_mean(normalized, part) for part in (QUALITY, SEMANTIC))
    total = None
    if quality is not None and semantic is not None:
        total = (QUALITY_WEIGHT * quality + SEMANTIC_WEIGHT * semantic) / (QUALITY_WEIGHT + SEMANTIC_WEIGHT)
    return {
        "normalized": normalized, "quality": quality, "semantic": semantic, "total": total,
        "missing": [name for name in every if name not in values],
    }  # fmt: skip


def _mean(normalized: Mapping[str, float], part: Mapping[str, tuple[float, float, float]]) -> float | None:
    if not set(part) <= set(normalized):
        return None
    weights = {name: weight for name, (_, _, weight) in part.items()}
    return sum(normalized[name] * weight for name, weight in weights.items()) / sum(weights.values())


def summarized_scores(metrics: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The scores of an evaluation's model, and under ``reference`` those of its reference where that was measured too.

    Args:
        metrics: The metrics as evaluation.json has them.
    """
    found = scores({name: entry["value"] for name, entry in metrics.items()})
    theirs = {name: entry["reference"]["value"] for name, entry in metrics.items() if "reference" in entry}
    return {**found, "reference": scores(theirs)} if theirs else found
