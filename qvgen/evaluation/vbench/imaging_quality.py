"""Imaging quality: the mean over frames of MUSIQ's score, trained on SPAQ, over 100: noise, blur, exposure.

Frames whose longer side has more than 512 pixels are resized to 512 first (VBench's mode "longer"), as tensors, bilinear
without antialiasing.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional

from qvgen.evaluation.metrics.base import Pair
from qvgen.evaluation.networks.musiq import load_musiq
from qvgen.evaluation.placement import sampling_device
from qvgen.evaluation.vbench import published_file
from qvgen.evaluation.vbench.dimension import NetworkDimension

LONGEST_SIDE = 512
_FRAMES_AT_ONCE = 4


class ImagingQuality(NetworkDimension):
    """Predicted technical quality of the frames; about 0 to 1, larger is better."""

    name, sampling = "imaging_quality", "all frames, each alone"
    title = "imaging quality"
    source = "VBench, arXiv 2311.17982, imaging quality (vbench/imaging_quality.py), MUSIQ (arXiv 2108.05997) on SPAQ"
    low = float("-inf")
    files = (published_file.MUSIQ,)
    blind_to = ("frozen",)

    def measure(self, pair: Pair) -> float:
        """See the module."""
        network, device = load_musiq(self.path(published_file.MUSIQ)), sampling_device()
        parts = pair.video.frames.split(_FRAMES_AT_ONCE)
        scores = [network(_prepared(part).to(device)).cpu() for part in parts]
        return float(torch.cat(scores).double().mean() / 100)


def _prepared(frames: UInt8[Tensor, "F H W 3"]) -> Float[Tensor, "F 3 H2 W2"]:
    """Frames as MUSIQ takes them, in [0, 1]."""
    pixels = frames.permute(0, 3, 1, 2).float()
    if (longest := max(pixels.shape[-2:])) > LONGEST_SIDE:
        size = [int(LONGEST_SIDE / longest * length) for length in pixels.shape[-2:]]
        pixels = functional.interpolate(pixels, size=size, mode="bilinear", align_corners=False)
    return pixels / 255
