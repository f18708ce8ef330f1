"""Multiple objects: how many frames show both objects that the prompt asks for, by GRiT's detector."""

from __future__ import annotations

from qvgen.evaluation.vbench.detected_objects import DetectorDimension


class MultipleObjects(DetectorDimension):
    """Share of the frames that show both objects."""

    name = "multiple_objects"
    title = "multiple objects"
    source = "VBench, arXiv 2311.17982, multiple objects (vbench/multiple_objects.py), GRiT"
