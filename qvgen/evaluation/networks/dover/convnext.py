"""ConvNeXt over frames (arXiv 2201.03545, inflated): the aesthetic branch of DOVER.

    clip [B, 3, F, H, W] -> 2 x 4 x 4 patches -> 4 stages of blocks; each but the first halves sides, doubles channels
                         -> layer norm over channels [B, C, F/2, H/32, W/32]

    block: x + gamma * W2 gelu(W1 norm(k * x)),  k a kernel of each channel: 7 x 7, over 1, 3, 1, 1, 3, 1, ... frames

Modules have the names of the published checkpoint.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

_EPS = 1e-6
_FRAMES = (1, 3, 1)
"""Frames that the kernels of a stage's blocks look at, in turn."""


@dataclass(frozen=True, kw_only=True)
class ConvNextSizes:
    """The sizes of ConvNeXt-T, and of smaller ones of the same kind.

    Attributes:
        widths: Channels of each stage.
        blocks: Blocks of each stage.
    """

    widths: tuple[int, ...] = (96, 192, 384, 768)
    blocks: tuple[int, ...] = (3, 3, 9, 3)


class _ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of [B, C, F, H, W]."""

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class _Block(nn.Module):
    def __init__(self, width: int, *, frames: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv3d(width, width, (frames, 7, 7), padding=(frames // 2, 3, 3), groups=width)
        self.norm = nn.LayerNorm(width, eps=_EPS)
        self.pwconv1, self.pwconv2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Maps [B, C, F, H, W]."""
        y = self.norm(self.dwconv(x).movedim(1, -1))
        z: Tensor = x + (self.gamma * self.pwconv2(functional.gelu(self.pwconv1(y)))).movedim(-1, 1)
        return z


class ConvNext(nn.Module):
    """The network; weights are given by whoever holds it."""

    def __init__(self, sizes: ConvNextSizes) -> None:
        super().__init__()
        widths = sizes.widths
        stem = nn.Sequential(nn.Conv3d(3, widths[0], (2, 4, 4), (2, 4, 4)), _ChannelNorm(widths[0], eps=_EPS))
        halving = [
            nn.Sequential(_ChannelNorm(before, eps=_EPS), nn.Conv3d(before, after, (1, 2, 2), (1, 2, 2)))
            for before, after in itertools.pairwise(widths)
        ]
        self.downsample_layers = nn.ModuleList([stem, *halving])
        self.stages = nn.ModuleList(
            nn.Sequential(*(_Block(width, frames=_FRAMES[number % len(_FRAMES)]) for number in range(count)))
            for width, count in zip(widths, sizes.blocks, strict=True)
        )
        self.norm = _ChannelNorm(widths[-1], eps=_EPS)

    def forward(self, clips: Float[Tensor, "B 3 F H W"]) -> Float[Tensor, "B C T Y X"]:
        """Features of normalized clips whose frames are even in number, and whose sides are multiples of 32."""
        x = clips
        for smaller, stage in zip(self.downsample_layers, self.stages, strict=True):
            x = stage(smaller(x))
        found: Tensor = self.norm(x)
        return found
