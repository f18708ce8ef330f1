"""Spatial relationship: whether two objects lie as the prompt says, by the boxes of what GRiT detects.

    a frame's score = the best of all pairs of boxes with the class of either object
    a pair's score  = 1 where their centers are further apart in the relation's direction than in the other one, else 0;
                      with an IoU of 0.1 or more 0.1 / IoU in the place of 1

The mean over 16 frames. As published, a pair may be two objects of one class, and left and right, as top and bottom, are the
same: what is measured is the direction. Boxes have whole pixels, rounded down.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from statistics import fmean

from qvgen.evaluation.metrics.base import Pair
from qvgen.evaluation.vbench.detected_objects import Box, DetectorDimension, text_of

_ACROSS, _DOWN = ("on the left of", "on the right of"), ("on the top of", "on the bottom of")
_OVERLAP = 0.1


class SpatialRelationship(DetectorDimension):
    """How well two objects lie as the prompt says, the mean over frames."""

    name = "spatial_relationship"
    title = "spatial relationship"
    source = "VBench, arXiv 2311.17982, spatial relationship (vbench/spatial_relationship.py), GRiT"

    def measure(self, pair: Pair) -> float:
        """See the module.

        Raises:
            ValueError: The list of prompts names no two objects and relation, the relation is none of the four, or a file is
                another one.
        """
        asked = self.asked(pair)
        inner = asked.get(self.name) if isinstance(asked, dict) else None
        where = f"vbench.info: {pair.caption!r} has auxiliary_info.{self.name}={asked}"
        wanted = {text_of(inner, key, where=where) for key in ("object_a", "object_b")}
        relation = text_of(inner, "relationship", where=where)
        if relation not in _ACROSS + _DOWN:
            raise ValueError(f"{where}; relationship is one of {', '.join(_ACROSS + _DOWN)}")
        return fmean(
            best_pair([box for name, box in frame if name in wanted], across=relation in _ACROSS)
            for frame in self.named(pair)
        )


def best_pair(boxes: Sequence[Box], *, across: bool) -> float:
    """The best score of two of the boxes; 0 for fewer than two.

    Args:
        boxes: The boxes.
        across: Whether they are to lie beside each other; otherwise above each other.

    >>> best_pair([(0, 0, 4, 4), (10, 1, 14, 5)], across=True)
    1.0
    >>> best_pair([(0, 0, 3, 4), (1, 0, 4, 4)], across=True)  # an IoU of a half
    0.2
    """
    return max((_score(*both, across=across) for both in combinations(boxes, 2)), default=0.0)


def _score(first: Box, second: Box, *, across: bool) -> float:
    apart = [abs(second[a] + second[a + 2] - first[a] - first[a + 2]) for a in (0, 1)]
    along, aside = apart if across else apart[::-1]
    if along <= aside:
        return 0.0
    common = 1
    for a in (0, 1):
        common *= max(0, min(first[a + 2], second[a + 2]) - max(first[a], second[a]))
    union = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (first, second)) - common
    # Two boxes of less than a pixel have no IoU; VBench's program ends with an error there.
    overlap = common / union if union else 0.0
    return 1.0 if overlap < _OVERLAP else _OVERLAP / overlap
