"""Motion smoothness: how near every second frame is to the middle of its neighbours, as AMT-S interpolates them.

    (255 - mean |frame - interpolated|) / 255          over the frames 1, 3, 5, ... that have both neighbours

Interpolated frames are cut off to whole levels, as published. Sides are made multiples of 16 by repeating the border, and the
shorter one 128 pixels or more in the same way, because VBench's own program can't interpolate smaller ones.
"""

from __future__ import annotations

from itertools import pairwise

from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional

from qvgen.evaluation.metrics.base import Pair
from qvgen.evaluation.networks.amt import MIN_SIDE, SIDE_MULTIPLE, load_amt
from qvgen.evaluation.placement import sampling_device
from qvgen.evaluation.vbench import published_file
from qvgen.evaluation.vbench.dimension import NetworkDimension


class MotionSmoothness(NetworkDimension):
    """Likeness of frames and what lies in the middle of their neighbours; 1 where nothing moves but evenly."""

    name, sampling = "motion_smoothness", "every second frame beside the middle of its neighbours"
    title = "motion smoothness"
    source = "VBench, arXiv 2311.17982, motion smoothness (vbench/motion_smoothness.py), AMT-S (arXiv 2304.09790)"
    high = 1.0
    files = (published_file.AMT,)
    blind_to = ("frozen",)

    def measure(self, pair: Pair) -> float:
        """See the module.

        Raises:
            ValueError: Fewer than three frames.
        """
        frames = pair.video.frames
        if len(frames) < 3:
            raise ValueError(
                f"motion smoothness needs videos of 3 frames or more, and they have {len(frames)}; leave it out"
            )
        network, device = load_amt(self.path(published_file.AMT)), sampling_device()
        differences = []
        for number, (before, after) in enumerate(pairwise(frames[::2])):
            padded = (_padded(frame).to(device) for frame in (before, after))
            middle = _cut(network(*padded).cpu()[0], like=before)
            differences.append((frames[2 * number + 1].double() - middle.double()).abs().mean())
        return float((255 - sum(differences) / len(differences)) / 255)


def _borders(length: int) -> tuple[int, int]:
    """Pixels to add before and behind."""
    more = max(-length % SIDE_MULTIPLE, MIN_SIDE - length)
    return more // 2, more - more // 2


def _padded(frame: UInt8[Tensor, "H W 3"]) -> Float[Tensor, "1 3 H2 W2"]:
    """A frame in [0, 1], its border repeated."""
    sides = (*_borders(frame.shape[1]), *_borders(frame.shape[0]))
    return functional.pad(frame.permute(2, 0, 1)[None].float() / 255, sides, mode="replicate")


def _cut(image: Float[Tensor, "3 H2 W2"], *, like: UInt8[Tensor, "H W 3"]) -> Tensor:
    """The part of an interpolated image that belongs to a frame, in whole levels [H, W, 3]."""
    top, left = _borders(like.shape[0])[0], _borders(like.shape[1])[0]
    cut = image[:, top : top + like.shape[0], left : left + like.shape[1]]
    return (cut * 255).floor().permute(1, 2, 0)
