"""RoIAlign (Mask R-CNN, arXiv 1703.06870, section 3): features of boxes at a fixed size, without rounding their borders.

A box is cut into S x S cells. A cell has ceil(cell height) x ceil(cell width) evenly spaced places, in units of the map, and
is the mean over them of the map by bilinear interpolation. The center of the map's first place is at 0.5 (``aligned=True``).
A place more than 1 outside of the map counts as 0, and one that is nearer as the border. Source: torchvision's ``roi_align``
with ``sampling_ratio=0``.

Places form a grid and the weights of a place are products of a row's and a column's. So the mean of cell (p, q) is

    sum over y, x of  rows[p, y] * map[y, x] * columns[q, x]

with two small matrices for each box: matrix products in the place of gathered neighbours, equal up to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from qvgen.evaluation.networks.grit.boxes import areas

_BOXES_AT_ONCE = 32
_USUAL_SIDE, _USUAL_LEVEL = 224.0, 4
"""A box of 224 x 224 pixels belongs to the level of stride 2^4 (FPN, arXiv 1612.03144, Eq. 1)."""


def roi_align(
    features: Float[Tensor, "C H W"], boxes: Float[Tensor, "N 4"], *, scale: float, side: int
) -> Float[Tensor, "N C S S"]:
    """Features of boxes, each in side x side cells.

    Args:
        features: A map.
        boxes: Boxes in pixels of the image, one or more.
        scale: Places of the map for a pixel.
        side: Rows and columns of cells.
    """
    channels, height, width = features.shape
    row_by_row = features.transpose(0, 1).flatten(1)
    found = []
    for part in (boxes * scale - 0.5).split(_BOXES_AT_ONCE):
        rows = _weights(part[:, 1], part[:, 3], length=height, side=side)
        columns = _weights(part[:, 0], part[:, 2], length=width, side=side)
        across = (rows.flatten(0, 1) @ row_by_row).view(len(part), side * channels, width)
        cells = across @ columns.transpose(1, 2)
        found.append(cells.view(len(part), side, channels, side).transpose(1, 2))
    return torch.cat(found)


def _weights(first: Tensor, last: Tensor, *, length: int, side: int) -> Tensor:
    """The part of each place of an axis in the mean of each cell, [N, side, length]."""
    cell = (last - first) / side
    counts = cell.ceil().clamp(min=0)
    inner = torch.arange(int(counts.max()), device=first.device, dtype=first.dtype)
    step = (cell / counts.clamp(min=1))[:, None, None]
    starts = first[:, None, None] + torch.arange(side, device=first.device)[:, None] * cell[:, None, None]
    places = starts + (inner + 0.5) * step
    used = (inner < counts[:, None, None]) & (places >= -1) & (places <= length)
    places = torch.where(used, places, 0.0).clamp(0, length - 1)
    near = places.floor()
    share = used / counts.clamp(min=1)[:, None, None]
    matrix = first.new_zeros(len(first), side, length)
    matrix.scatter_add_(2, near.long(), share * (1 - (places - near)))
    return matrix.scatter_add_(2, (near.long() + 1).clamp(max=length - 1), share * (places - near))


def level_of(boxes: Float[Tensor, "N 4"], *, levels: int, first: int) -> Tensor:
    """Number of the level of each box, from 0: the larger the box, the coarser the map (FPN, arXiv 1612.03144, Eq. 1).

    Args:
        boxes: Boxes in pixels.
        levels: Maps, each with twice the stride of the one before.
        first: Binary logarithm of the stride of the first map.
    """
    level = (_USUAL_LEVEL + torch.log2(areas(boxes).sqrt() / _USUAL_SIDE + 1e-8)).floor()
    return level.clamp(first, first + levels - 1).long() - first


def pooled(
    maps: Sequence[Float[Tensor, "C h w"]], boxes: Float[Tensor, "N 4"], *, first: int, side: int
) -> Float[Tensor, "N C S S"]:
    """Features of boxes, each from the map of its size; ``first`` as in :func:`level_of`."""
    levels = level_of(boxes, levels=len(maps), first=first)
    found = boxes.new_zeros(len(boxes), maps[0].shape[0], side, side)
    for number, features in enumerate(maps):
        chosen = levels == number
        if bool(chosen.any()):
            found[chosen] = roi_align(features, boxes[chosen], scale=2.0 ** -(first + number), side=side)
    return found
