"""Temporal style: how well videos fit prompts that ask for how the camera or time moves, by ViCLIP."""

from __future__ import annotations

from qvgen.evaluation.vbench.viclip_similarity import ViclipDimension


class TemporalStyle(ViclipDimension):
    """Cosine of the video and its prompt; larger fits better."""

    name = "temporal_style"
    title = "temporal style"
    source = "VBench, arXiv 2311.17982, temporal style (vbench/temporal_style.py), ViCLIP"
