"""Warping error: what is left of the change from frame to frame once the motion is taken out of it.

    w_f(x) = frame_{f+1}(x + flow_f(x))                      bilinear, pixels in [0, 1]
    error  = mean over frames, channels and visible x of (frame_f(x) - w_f(x))^2

A place is visible where it lands inside of the frame and the flow back agrees with the flow there,

    |flow_f(x) + back_f(x + flow_f(x))|^2 <= 0.01 (|flow_f(x)|^2 + |back_f(x + flow_f(x))|^2) + 0.5     (in pixels^2)

(Lai et al. 2018, arXiv 1808.00449, Eq. 12; the rule of occlusion is Ruder et al. 2016, arXiv 1604.08610, Eq. 5.)
A pair of frames without a visible place has no motion that both flows agree on; its frames are compared as they are.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from qvgen.evaluation.metrics.base import Pair, VideoMetric, check_frames
from qvgen.evaluation.metrics.flow import flow_of
from qvgen.evaluation.metrics.motion_compensation import unexplained_change
from qvgen.evaluation.networks import fetched


class WarpingError(VideoMetric):
    """The change that motion does not explain; smaller is steadier, 0 where each frame is the one before, moved."""

    title = "warping error"
    source = "Lai et al. 2018, arXiv 1808.00449, Eq. 12, with RAFT's flow"
    high = 1.0
    better, paired = "lower", False
    blind_to = ("frozen", "blur", "color")
    weights = (fetched.RAFT,)

    def measure(self, pair: Pair) -> float:
        """See the module."""
        check_frames(pair.video, metric=self.title)
        return warping_error(pair.video.frames, flow_of(pair.video), flow_of(pair.video, backward=True))


def warping_error(frames: Tensor, flow: Float[Tensor, "F-1 2 H W"], backward: Float[Tensor, "F-1 2 H W"]) -> float:
    """The error of a video under known flows; see the module.

    Args:
        frames: uint8 [F, H, W, 3].
        flow: float64, from each frame to the next, x then y, in pixels.
        backward: float64, from each next frame to the one before.
    """
    return unexplained_change(frames.permute(0, 3, 1, 2).double() / 255, flow, backward)
