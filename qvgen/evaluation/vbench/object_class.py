"""Object class: how many frames show the object that the prompt asks for, by GRiT's detector."""

from __future__ import annotations

from qvgen.evaluation.vbench.detected_objects import DetectorDimension


class ObjectClass(DetectorDimension):
    """Share of the frames that show the object."""

    name = "object_class"
    title = "object class"
    source = "VBench, arXiv 2311.17982, object class (vbench/object_class.py), GRiT"
