"""Color: whether the object has the color that the prompt asks for, by GRiT's captions of what it detects."""

from __future__ import annotations

from qvgen.evaluation.vbench.detected_objects import DetectorDimension


class Color(DetectorDimension):
    """Share of the frames with the object in which it has the color."""

    name = "color"
    title = "color"
    source = "VBench, arXiv 2311.17982, color (vbench/color.py), GRiT"
