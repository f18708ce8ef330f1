"""Motion-compensated error: how much of the difference to the reference's video changes along the reference's motion.

    e_f(x) = video_f(x) - reference_f(x)                                       pixels in [0, 1]
    error  = mean over frames, channels and visible x of (e_f(x) - e_{f+1}(x + flow_f(x)))^2

That is the warping error (Lai et al. 2018, arXiv 1808.00449, Eq. 12; :mod:`qvgen.evaluation.metrics.warping_error`, which
has the rule of visible places) of the difference of both videos, with the flow of the reference's: as Bonneel et al. 2015
(Blind video temporal consistency, Eq. 1) judge a processed video by the motion of the one that it was made from. A difference
that moves along with what it lies on costs nothing, and a cast of colour only where it is cut at black or white; one that
flickers, crawls or stands still on a moving thing costs what it changes.
"""

from __future__ import annotations

from qvgen.evaluation.metrics.base import Pair, VideoMetric, check_frames
from qvgen.evaluation.metrics.flow import flow_of
from qvgen.evaluation.metrics.motion_compensation import unexplained_change
from qvgen.evaluation.networks import fetched


class MotionCompensatedError(VideoMetric):
    """Change of the difference to the reference along its motion; smaller is steadier, 0 for equal videos."""

    title = "motion-compensated error"
    source = "Lai et al. 2018, arXiv 1808.00449, Eq. 12, of the difference to the reference, with its flow by RAFT"
    high = 4.0
    better, paired = "lower", True
    weights, slow_on_cpu = (fetched.RAFT,), True

    def measure(self, pair: Pair) -> float:
        """See the module."""
        assert pair.reference is not None, "it is paired"
        check_frames(pair.video, metric=self.title)
        difference = (pair.video.frames.double() - pair.reference.frames.double()) / 255
        flow, backward = flow_of(pair.reference), flow_of(pair.reference, backward=True)
        return unexplained_change(difference.permute(0, 3, 1, 2), flow, backward)
