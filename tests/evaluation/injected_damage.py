"""Damage of known strength, injected into a video: what a metric that claims to see it has to notice.

Each takes uint8 [F, H, W, 3] and a strength in 1..4, and is a pure function of them.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

STRENGTHS = (1, 2, 3, 4)


def _rounded(frames: Tensor) -> Tensor:
    return frames.round().clamp(0, 255).to(torch.uint8)


def noise(frames: Tensor, strength: int) -> Tensor:
    """Gaussian noise, another in every frame: 6, 12, 24, 48 levels."""
    drawn = torch.randn(frames.shape, generator=torch.Generator().manual_seed(5))
    return _rounded(frames.float() + 3 * 2**strength * drawn)


def frozen(frames: Tensor, strength: int) -> Tensor:
    """Frames held from a quarter, half, three quarters, all of the video's length before its end."""
    last = len(frames) - strength * len(frames) // 4
    held = frames.clone()
    held[last:] = frames[max(0, last - 1)]
    return held


def flicker(frames: Tensor, strength: int) -> Tensor:
    """Every other frame brighter by 8, 16, 32, 64 levels."""
    brighter = frames.float()
    brighter[1::2] += 4 * 2**strength
    return _rounded(brighter)


def blur(frames: Tensor, strength: int) -> Tensor:
    """A box of 3, 5, 7, 9 pixels."""
    size = 2 * strength + 1
    planes = frames.permute(0, 3, 1, 2).float()
    padded = functional.pad(planes, (strength,) * 4, mode="replicate")
    return _rounded(functional.avg_pool2d(padded, size, 1).permute(0, 2, 3, 1))


def color(frames: Tensor, strength: int) -> Tensor:
    """A cast: red brighter and blue darker by 8, 16, 32, 64 levels."""
    return _rounded(frames.float() + 4 * 2**strength * torch.tensor([1.0, 0.0, -1.0]))


DAMAGE = {"noise": noise, "frozen": frozen, "flicker": flicker, "blur": blur, "color": color}
