"""How far the motion of a video is from the reference's: mean |flow_a - flow_b| as a share of the frame's diagonal.

The flow from each frame to the next is RAFT's. ViDiT-Q scores the flow of its videos by comparing the mean lengths of two
flows; here the two vectors of each pixel are compared, so that motion in another direction counts too.
"""

from __future__ import annotations

from qvgen.evaluation.metrics.base import Pair, VideoMetric, check_frames
from qvgen.evaluation.metrics.flow import flow_of
from qvgen.evaluation.networks import fetched


class FlowDifference(VideoMetric):
    """End-point error of the flow; smaller is closer to the reference, 0 for equal videos."""

    title, unit = "flow difference", "diagonals"
    source = "end-point error of RAFT's flow (arXiv 2003.12039) between the two videos"
    better, paired = "lower", True
    weights, slow_on_cpu = (fetched.RAFT,), True

    def measure(self, pair: Pair) -> float:
        """See the module."""
        assert pair.reference is not None, "it is paired"
        check_frames(pair.video, metric=self.title)
        height, width = pair.video.frames.shape[1:3]
        diagonal = (height**2 + width**2) ** 0.5
        return float((flow_of(pair.video) - flow_of(pair.reference)).norm(dim=1).mean()) / diagonal
