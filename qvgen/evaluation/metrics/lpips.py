"""LPIPS of a video to the reference's: the mean over frames (:mod:`qvgen.evaluation.networks.lpips`)."""

from __future__ import annotations

from qvgen.evaluation.metrics.base import Pair, VideoMetric
from qvgen.evaluation.networks import fetched


class PerceptualDistance(VideoMetric):
    """LPIPS of AlexNet; smaller is closer to the reference, 0 for equal videos."""

    title = "LPIPS"
    source = "arXiv 1801.03924, version 0.1, AlexNet"
    better, paired = "lower", True
    weights = (fetched.LPIPS,)

    def measure(self, pair: Pair) -> float:
        """See the module."""
        assert pair.reference is not None, "it is paired"
        path = fetched.LPIPS.path
        assert path is not None, "absent() is asked first"
        found = fetched.lpips_of_frames(fetched.load_lpips(path), pair.video.frames[None], pair.reference.frames[None])
        return float(found.mean())
