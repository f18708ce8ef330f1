"""Warping error: what is left of the change from frame to frame once the motion is taken out of it.

    w_f(x) = frame_{f+1}(x + flow_f(x))                      bilinear, pixels in [0, 1]
    error  = mean over frames, channels and visible x of (frame_f(x) - w_f(x))^2

A place is visible where it lands inside of the frame and the flow back agrees with the flow there,

    |flow_f(x) + back_f(x + flow_f(x))|^2 <= 0.01 (|flow_f(x)|^2 + |back_f(x + flow_f(x))|^2) + 0.5     (in pixels^2)

(Lai et al. 2018, arXiv 1808.00449, Eq. 12; the rule of occlusion is Ruder et al. 2016, arXiv 1604.08610, Eq. 5.)
A pair of frames without a visible place has no motion that both flows agree on; its frames are compared as they are.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from qvgen.evaluation.metrics.base import Pair, VideoMetric, check_frames
from qvgen.evaluation.metrics.flow import flow_of
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


def unexplained_change(
    pixels: Float[Tensor, "F C H W"], flow: Float[Tensor, "F-1 2 H W"], backward: Float[Tensor, "F-1 2 H W"]
) -> float:
    """The mean squared change along a known motion, of any values: the error above is that of the pixels.

    Args:
        pixels: float64.
        flow: float64, from each frame to the next, x then y, in pixels.
        backward: float64, from each next frame to the one before.
    """
    moved, inside = _warp(pixels[1:], flow)
    back, _ = _warp(backward, flow)
    disagreement = (flow + back).square().sum(1)
    lengths = flow.square().sum(1) + back.square().sum(1)
    visible = inside & (disagreement <= 0.01 * lengths + 0.5)
    squared = (pixels[:-1] - moved).square().mean(1)
    counts = visible.sum((1, 2))
    sums = torch.where(visible, squared, 0.0).sum((1, 2))
    unmoved = pixels.diff(dim=0).square().mean((1, 2, 3))
    return float(torch.where(counts > 0, sums / counts.clamp(min=1), unmoved).mean())


def _warp(images: Tensor, flow: Tensor) -> tuple[Tensor, Tensor]:
    """Images [N, C, H, W] at x + flow(x), and where that is inside of the frame, bool [N, H, W]."""
    height, width = images.shape[-2:]
    rows = torch.arange(height, dtype=flow.dtype).view(1, -1, 1) + flow[:, 1]
    columns = torch.arange(width, dtype=flow.dtype).view(1, 1, -1) + flow[:, 0]
    grid = torch.stack((2 * columns / max(1, width - 1) - 1, 2 * rows / max(1, height - 1) - 1), -1)
    inside = (rows >= 0) & (rows <= height - 1) & (columns >= 0) & (columns <= width - 1)
    found = functional.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=True)
    return found, inside
