"""CLIPSIM: how well the frames of a video fit its caption, the mean cosine of a user's text-image model."""

from __future__ import annotations

from qvgen.evaluation.metrics.base import Pair
from qvgen.evaluation.metrics.clip_model import ClipMetric
from qvgen.evaluation.placement import sampling_device


class ClipSimilarity(ClipMetric):
    """Mean cosine of the frames and the caption; larger fits better."""

    title = "CLIPSIM"
    source = "GODIVA, arXiv 2104.14806, 5.1; the model is the one that is named"
    low, high = -1.0, 1.0
    better, paired = "higher", False
    blind_to = ("frozen", "flicker")

    def measure(self, pair: Pair) -> float:
        """See the module."""
        if pair.caption is None:
            raise ValueError("CLIPSIM needs the captions of the videos; write prompts=FILE, or leave it out")
        return float(self.model(pair.video.frames[None], [pair.caption], device=sampling_device()).double().mean())
