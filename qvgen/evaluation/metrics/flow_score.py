"""How much a video moves: the mean length of the optical flow from each frame to the next, in pixels.

EvalCrafter's "Flow-Score" (arXiv 2310.11440, 3.2.3) by RAFT. More motion is no better motion: noise moves too. It is read
beside the reference's, whose motion a quantized model should keep.
"""

from __future__ import annotations

from qvgen.evaluation.metrics.base import Pair, VideoMetric, check_frames
from qvgen.evaluation.metrics.flow import flow_of
from qvgen.evaluation.networks import fetched


class FlowScore(VideoMetric):
    """Mean length of the flow; a change from the reference's in either direction is a change."""

    title, unit = "flow score", "pixels"
    source = "EvalCrafter, arXiv 2310.11440, 3.2.3, by RAFT (arXiv 2003.12039)"
    better, paired = "neither", False
    weights = (fetched.RAFT,)

    def measure(self, pair: Pair) -> float:
        """See the module."""
        check_frames(pair.video, metric=self.title)
        return float(flow_of(pair.video).norm(dim=1).mean())
