"""Multiple objects: how many frames show both objects that the prompt asks for, by GRiT's names of what it detects.

the share of 16 frames in which objects of both classes are found
"""

from __future__ import annotations

from qvgen.evaluation.metrics.base import Pair
from qvgen.evaluation.vbench.detected_objects import DetectorDimension


class MultipleObjects(DetectorDimension):
    """Share of the frames that show both objects."""

    name = "multiple_objects"
    title = "multiple objects"
    source = "VBench, arXiv 2311.17982, multiple objects (vbench/multiple_objects.py), GRiT"

    def measure(self, pair: Pair) -> float:
        """See the module.

        Raises:
            ValueError: The list of prompts names no two objects, or a file is another one.
        """
        asked = self.asked_text(pair, "object")
        both = [name.strip() for name in asked.split(" and ")]
        if len(both) != 2:
            raise ValueError(
                f"vbench.info: {pair.caption!r} has auxiliary_info.{self.name}.object={asked!r}, which is not "
                "two objects with ' and ' between them"
            )
        frames = self.named(pair)
        return sum({*both} <= {name for name, _ in frame} for frame in frames) / len(frames)
