"""Background consistency: whether the scene stays the same, by the features that CLIP ViT-B/32 has of each frame.

See :mod:`qvgen.evaluation.vbench.consistency` for the formula.
"""

from __future__ import annotations

from qvgen.evaluation.metrics.base import Pair, check_frames
from qvgen.evaluation.vbench import published_file
from qvgen.evaluation.vbench.clip_features import clip_features
from qvgen.evaluation.vbench.consistency import consistency
from qvgen.evaluation.vbench.dimension import NetworkDimension


class BackgroundConsistency(NetworkDimension):
    """Cosines of the frames' features; 1 where all frames are alike."""

    name, sampling = "background_consistency", "all frames, each beside the one before and the first"
    title = "background consistency"
    source = "VBench, arXiv 2311.17982, background consistency (vbench/background_consistency.py), CLIP ViT-B/32"
    high = 1.0
    files = (published_file.CLIP_B,)
    blind_to = ("frozen",)

    def measure(self, pair: Pair) -> float:
        """See the module."""
        check_frames(pair.video, metric=self.title)
        return consistency(clip_features(pair.video, self.path(published_file.CLIP_B)))
