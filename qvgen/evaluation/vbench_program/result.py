"""The results of VBench's program, checked: finite numbers, known names, one entry for each video.

    {"DIMENSION": [score, [{"video_path": ".../a bird and a cat-0.mp4", "video_results": 0.75, ...}, ...]]}

A score and a video's number can be true or false, as dynamic degree and human action have them. Two dimensions differ, as
vbench 0.1.5 has them: *imaging quality* has videos of 0 to 100 and a score of 0 to 1, and *color* leaves out the videos
in which the detector never sees the object.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from pathlib import PurePath
from typing import Any

from qvgen.errors import UnfitEnvironmentError

PARTS_OF_ONE = {"imaging_quality": 100.0}
"""Dimension -> the number of a video that is a score of 1."""
MAY_LEAVE_OUT = frozenset({"color"})
_SCORE_TOLERANCE = 1e-3


def read_result(content: Any, dimension: str, *, names: Collection[str]) -> tuple[float, dict[str, float]]:
    """The score and the videos' values, both in the unit of the score.

    Args:
        content: The file of results.
        dimension: The one that was asked for.
        names: Names of the video files that the dimension concerns.

    Returns:
        The program's own score, and name -> value.

    Raises:
        UnfitEnvironmentError: It is not of that form, with what is wrong.
    """

    def refused(what: str) -> UnfitEnvironmentError:
        return UnfitEnvironmentError(f"VBench's program answers for {dimension} {what}; vbench 0.1.5 is known to qvgen")

    found = content.get(dimension) if isinstance(content, dict) else None
    if not isinstance(found, list) or len(found) != 2 or not isinstance(found[1], list):
        raise refused("with no pair of a score and a list of videos")
    score, values, unit = _number(found[0]), {}, PARTS_OF_ONE.get(dimension, 1.0)
    if score is None:
        raise refused(f"with the score {found[0]!r}, which is no finite number")
    for row in found[1]:
        path = row.get("video_path") if isinstance(row, dict) else None
        name = PurePath(path).name if isinstance(path, str) else None
        if name is None or name not in names:
            raise refused(f"with an entry of {path!r}, which is no video that was asked for")
        if name in values:
            raise refused(f"with two entries of {name}")
        value = _number(row.get("video_results"))
        if value is None:
            raise refused(f"with {row.get('video_results')!r} of {name}, which is no finite number")
        values[name] = value / unit
    missing = [name for name in names if name not in values]
    if missing and dimension not in MAY_LEAVE_OUT:
        raise refused(f"without {len(missing)} of {len(names)} videos, the first of them {missing[0]}")
    if dimension in PARTS_OF_ONE and abs(sum(values.values()) / len(values) - score) > _SCORE_TOLERANCE:
        raise refused(f"with the score {score:g}, and videos that are no parts of {unit:g}")
    return score, values


def _number(value: Any) -> float | None:
    """A finite number; None: it is something else."""
    return float(value) if isinstance(value, bool | int | float) and math.isfinite(value) else None
