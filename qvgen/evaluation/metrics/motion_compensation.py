"""The change of a video from frame to frame that a known motion does not explain; warping_error.py has the formulas."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional


def unexplained_change(
    pixels: Float[Tensor, "F C H W"], flow: Float[Tensor, "F-1 2 H W"], backward: Float[Tensor, "F-1 2 H W"]
) -> float:
    """The mean squared change along a known motion, of any values: the warping error is that of the pixels.

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
