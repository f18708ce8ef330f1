"""CLIP-Temp: how alike neighbouring frames are, the mean cosine of their features by a user's text-image model."""

from __future__ import annotations

from qvgen.evaluation.metrics.base import Pair, check_frames
from qvgen.evaluation.metrics.clip_model import ClipMetric
from qvgen.evaluation.placement import sampling_device


class ClipTemporal(ClipMetric):
    """Mean cosine of each frame and the next one; larger is steadier, 1 for frames that are alike."""

    title = "CLIP-Temp"
    source = "EvalCrafter, arXiv 2310.11440, 3.2.4; the model is the one that is named"
    low, high = -1.0, 1.0
    better, paired = "higher", False
    blind_to = ("frozen", "blur", "color")

    def measure(self, pair: Pair) -> float:
        """See the module."""
        check_frames(pair.video, metric=self.title)
        features = self.model.image_features(pair.video.frames, device=sampling_device()).double()
        return float((features[:-1] * features[1:]).sum(1).mean())
