"""Temporal flickering: (255 - mean |frame_{f+1} - frame_f|) / 255, VBench's dimension of this name.

VBench measures it on prompts that ask for standing still, where any change is unwanted. On moving captions motion lowers it
as well, so there it is read beside the reference's. With VBench's list of prompts it looks at the videos of its own alone.
VBench drops videos that move before it measures (static_filter.py) and samples 25 of each prompt; neither is done here.
"""

from __future__ import annotations

from qvgen.evaluation.distance import flicker
from qvgen.evaluation.metrics.base import Pair, check_frames
from qvgen.evaluation.vbench.dimension import Dimension


class TemporalFlickering(Dimension):
    """Steadiness of the frames; larger is steadier, 1 where nothing changes."""

    name, sampling = "temporal_flickering", "all frames, each beside the next"
    title = "temporal flickering"
    source = "VBench, arXiv 2311.17982, temporal flickering"
    high = 1.0
    blind_to = ("frozen", "blur", "color")

    def measure(self, pair: Pair) -> float:
        """See the module."""
        check_frames(pair.video, metric=self.title)
        return (255.0 - flicker(pair.video.frames)) / 255.0
