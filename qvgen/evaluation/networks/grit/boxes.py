"""Boxes in pixels, float [N, 4] as (left, top, right, bottom): overlap, suppression, limits and moves.

    IoU(a, b) = |a and b| / (|a| + |b| - |a and b|)
    NMS        from the best score down: a box stays unless one that stays has an IoU with it above the threshold
    a move     center += size * (dx, dy) / (wx, wy);   size *= exp((dw, dh) / (ww, wh)), at most 62.5 times

Sources: torchvision's ``nms`` and detectron2's ``Box2BoxTransform`` (Faster R-CNN, arXiv 1506.01497, Eq. 2).
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

_LARGEST_GROWTH = math.log(1000 / 16)


def areas(boxes: Float[Tensor, "N 4"]) -> Float[Tensor, " N"]:
    """Width times height of each box."""
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def overlaps(boxes: Float[Tensor, "N 4"], others: Float[Tensor, "M 4"]) -> Float[Tensor, "N M"]:
    """IoU of each box with each other one; NaN between two boxes without area."""
    first = torch.maximum(boxes[:, None, :2], others[None, :, :2])
    last = torch.minimum(boxes[:, None, 2:], others[None, :, 2:])
    common = (last - first).clamp(min=0).prod(-1)
    return common / (areas(boxes)[:, None] + areas(others)[None] - common)


def suppressed(boxes: Float[Tensor, "N 4"], scores: Float[Tensor, " N"], *, threshold: float) -> Int[Tensor, " K"]:
    """Numbers of the boxes that stay, the best first; of equal scores the earlier box goes first."""
    order = scores.sort(descending=True, stable=True).indices
    ranked = boxes[order]
    too_near = (overlaps(ranked, ranked) > threshold).cpu()
    stays = torch.ones(len(order), dtype=torch.bool)
    for rank in range(len(order)):
        if stays[rank]:
            stays[rank + 1 :] &= ~too_near[rank, rank + 1 :]
    return order[stays.to(order.device)]


def clipped(boxes: Float[Tensor, "N 4"], *, height: int, width: int) -> Float[Tensor, "N 4"]:
    """Boxes cut at the borders of an image."""
    limits = boxes.new_tensor([width, height, width, height])
    return boxes.clamp(min=0).minimum(limits)


def moved(
    boxes: Float[Tensor, "N 4"], deltas: Float[Tensor, "N 4"], *, weights: tuple[float, float]
) -> Float[Tensor, "N 4"]:
    """Boxes moved and scaled.

    Args:
        boxes: The boxes.
        deltas: Moves (dx, dy, dw, dh) of each.
        weights: Divisors of moves of the center, and of the logarithms of sizes.
    """
    size = boxes[:, 2:] - boxes[:, :2]
    center = boxes[:, :2] + 0.5 * size
    center = center + deltas[:, :2] / weights[0] * size
    half = 0.5 * size * (deltas[:, 2:] / weights[1]).clamp(max=_LARGEST_GROWTH).exp()
    return torch.cat((center - half, center + half), 1)
