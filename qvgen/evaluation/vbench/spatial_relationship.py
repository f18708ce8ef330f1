"""Spatial relationship: whether two objects lie as the prompt says, by GRiT's boxes."""

from __future__ import annotations

from qvgen.evaluation.vbench.detected_objects import DetectorDimension


class SpatialRelationship(DetectorDimension):
    """How well two objects lie as the prompt says, the mean over frames."""

    name = "spatial_relationship"
    title = "spatial relationship"
    source = "VBench, arXiv 2311.17982, spatial relationship (vbench/spatial_relationship.py), GRiT"
