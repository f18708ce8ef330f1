"""Overall consistency: how well videos fit prompts that ask for everything, by ViCLIP."""

from __future__ import annotations

from qvgen.evaluation.vbench.viclip_similarity import ViclipDimension


class OverallConsistency(ViclipDimension):
    """Cosine of the video and its prompt; larger fits better."""

    name = "overall_consistency"
    title = "overall consistency"
    source = "VBench, arXiv 2311.17982, overall consistency (vbench/overall_consistency.py), ViCLIP"
