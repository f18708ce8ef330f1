"""Object class: how many frames show the object that the prompt asks for, by GRiT's names of what it detects.

the share of 16 frames in which an object of that class is found
"""

from __future__ import annotations

from qvgen.evaluation.metrics.base import Pair
from qvgen.evaluation.vbench.detected_objects import DetectorDimension


class ObjectClass(DetectorDimension):
    """Share of the frames that show the object."""

    name = "object_class"
    title = "object class"
    source = "VBench, arXiv 2311.17982, object class (vbench/object_class.py), GRiT"

    def measure(self, pair: Pair) -> float:
        """See the module; raises ValueError where the list of prompts names no object, or a file is another one."""
        asked = self.asked_text(pair, "object")
        frames = self.named(pair)
        return sum(any(name == asked for name, _ in frame) for frame in frames) / len(frames)
