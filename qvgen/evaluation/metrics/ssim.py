"""SSIM of a video to the reference's, the mean over frames, channels and pixels (:func:`qvgen.evaluation.distance.ssim`)."""

from __future__ import annotations

from qvgen.evaluation.distance import ssim
from qvgen.evaluation.metrics.base import Pair, VideoMetric
from qvgen.evaluation.placement import sampling_device


class StructuralSimilarity(VideoMetric):
    """SSIM; larger is closer to the reference, 1 for equal videos."""

    title = "SSIM"
    source = "Wang et al. 2004, Image quality assessment: from error visibility to structural similarity, Eq. 13"
    low, high = -1.0, 1.0
    better, paired = "higher", True

    def measure(self, pair: Pair) -> float:
        """See the module; a large video takes minutes on a CPU core, so it goes to the GPU where there is one."""
        assert pair.reference is not None, "it is paired"
        device = sampling_device()
        return ssim(pair.video.frames.to(device), pair.reference.frames.to(device), max_value=255)
