"""PSNR of a video to the reference's, over all pixels and frames: 10 log10(255^2 / mean (a - b)^2).

It is cut at 100 dB: equal videos have no finite one, and one of them would make the mean of all videos infinite. Ten
billion pixels that differ in one level once have 148 dB; what is above 100 can't be seen by anybody.
"""

from __future__ import annotations

from qvgen.evaluation.distance import PSNR_CUT_DB, psnr_db
from qvgen.evaluation.metrics.base import Pair, VideoMetric


class PeakSignalToNoise(VideoMetric):
    """PSNR; larger is closer to the reference."""

    title, unit = "PSNR", "dB"
    source = "peak signal to noise ratio of 8 bit video, as ITU-T J.340 defines it"
    high = PSNR_CUT_DB
    better, paired = "higher", True

    def measure(self, pair: Pair) -> float:
        """See the module."""
        assert pair.reference is not None, "it is paired"
        return min(self.high, psnr_db(pair.video.frames, pair.reference.frames, max_value=255))
