"""Trained networks with the weights that `qvgen assets` fetches, as functions of uint8 videos: LPIPS, I3D and RAFT.

    lpips_of_frames   two videos -> LPIPS of each pair of frames
    i3d_logits        videos     -> I3D's logits of each video
    optical_flow      videos     -> RAFT's flow from each frame to the next

They run on the GPU where there is one. A network is loaded once in a process and stays there.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from qvgen.data.asset_table import ASSETS
from qvgen.data.assets import find_asset
from qvgen.evaluation.networks import i3d, lpips, raft
from qvgen.evaluation.placement import sampling_device

_FRAMES_AT_ONCE = 8


@dataclass(frozen=True, kw_only=True)
class Weights:
    """The weights of a network, a file of an asset.

    Attributes:
        asset: Name in the table of `qvgen assets`.
        file: Path in the asset's folder.
    """

    asset: str
    file: str

    @property
    def path(self) -> Path | None:
        """The file; None: the asset was not fetched."""
        folder = find_asset(self.asset)
        return None if folder is None else folder / self.file

    @property
    def sha256(self) -> str:
        """Checksum of the asset's archive, which fetching has compared."""
        (found,) = (entry for entry in ASSETS if entry.name == self.asset)
        return found.sha256

    @property
    def absent(self) -> str | None:
        """Why there are none, and what to do; None: they are there."""
        if self.path is not None and self.path.is_file():
            return None
        return f"{self.asset}/{self.file} is not there; fetch it with `qvgen assets names=[{self.asset}]`"


LPIPS = Weights(asset=lpips.ASSET, file=lpips.FILE)
I3D = Weights(asset=i3d.ASSET, file=i3d.FILE)
RAFT = Weights(asset=raft.ASSET, file=raft.FILE)


@cache
def load_lpips(path: Path) -> lpips.Lpips:
    """LPIPS on the device that measures; raises ValueError for a damaged file."""
    return lpips.Lpips.load(path).to(sampling_device())


@cache
def load_i3d(path: Path) -> i3d.I3d:
    """I3D on the device that measures; raises ValueError for a damaged file."""
    return i3d.I3d.load(path).to(sampling_device())


@cache
def load_raft(path: Path) -> raft.Raft:
    """RAFT on the device that measures; raises ValueError for a damaged file."""
    return raft.Raft.load(path).to(sampling_device())


def lpips_of_frames(
    network: lpips.Lpips, videos: UInt8[Tensor, "B F H W 3"], reference: UInt8[Tensor, "B F H W 3"]
) -> Float[Tensor, " N"]:
    """LPIPS of each pair of frames, float64 [B F], on the CPU."""
    frames = (_frames(x).split(_FRAMES_AT_ONCE) for x in (videos, reference))
    return torch.cat([network(*map(_pixels, pair)).cpu() for pair in zip(*frames, strict=True)]).double()


def i3d_logits(network: i3d.I3d, videos: UInt8[Tensor, "B F H W 3"]) -> Float[Tensor, "B 400"]:
    """I3D's logits of each video, float64 [B, 400], on the CPU; one video at a time, for memory."""
    parts = videos.permute(0, 4, 1, 2, 3).split(1)  # 49 frames are 80 MB behind the first layer
    return torch.cat([network(_pixels(part)).cpu() for part in parts]).double()


def optical_flow(network: raft.Raft, videos: UInt8[Tensor, "B F H W 3"]) -> Float[Tensor, "N 2 H W"]:
    """RAFT's flow from each frame to the next in pixels (x, then y), float64 [B (F - 1), 2, H, W], on the CPU."""
    pairs = (_frames(part).split(_FRAMES_AT_ONCE) for part in (videos[:, :-1], videos[:, 1:]))
    return torch.cat([network(*map(_pixels, pair)).cpu() for pair in zip(*pairs, strict=True)]).double()


def _frames(videos: Tensor) -> Tensor:
    """All frames uint8 [B F, 3, H, W]."""
    return videos.flatten(0, 1).permute(0, 3, 1, 2)


def _pixels(frames: Tensor) -> Tensor:
    """Videos as float32 in [-1, 1], on the device where networks run."""
    return frames.to(sampling_device()).float() / 127.5 - 1
