"""Temporal flickering: (255 - mean |frame_{f+1} - frame_f|) / 255, VBench's dimension of this name.

VBench measures it on prompts that ask for standing still, where any change is unwanted. On moving captions motion lowers it
as well, so there it is read beside the reference's.
"""

from __future__ import annotations

from qvgen.evaluation.distance import flicker
from qvgen.evaluation.metrics.base import Pair, VideoMetric, check_frames


class TemporalFlickering(VideoMetric):
    """Steadiness of the frames; larger is steadier, 1 where nothing changes."""

    title = "temporal flickering"
    source = "VBench, arXiv 2311.17982, temporal flickering"
    high = 1.0
    better, paired = "higher", False
    blind_to = ("frozen", "blur", "color")

    def measure(self, pair: Pair) -> float:
        """See the module."""
        check_frames(pair.video, metric=self.title)
        return (255.0 - flicker(pair.video.frames)) / 255.0
