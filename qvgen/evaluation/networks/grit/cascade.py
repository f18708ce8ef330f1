"""The cascade (Cascade R-CNN, arXiv 1712.00726) that makes of proposals the objects of an image.

    boxes -> features of 7 x 7 cells -> two linear layers -> is it an object (2 logits), and a move of the box     three times
    score = sqrt(the mean of the three probabilities * the proposal's score)
    above 0.5 -> NMS at an IoU of 0.5 -> at most 256, the best first

Each stage moves the boxes of the one before, cut at the image's borders; the first takes proposals as they are. The score's
threshold of 0.5 is VBench's, which has soft NMS off. Modules have the names of ``grit_b_densecap_objectdet.pth`` below
``roi_heads``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from qvgen.evaluation.networks.grit.boxes import clipped, moved, suppressed
from qvgen.evaluation.networks.grit.roi_align import pooled

FIRST_LEVEL, LEVELS = 3, 3
"""Boxes take features of the maps of stride 2^3, 2^4 and 2^5."""

_MOVES = ((10.0, 5.0), (20.0, 10.0), (30.0, 15.0))
_SIDE, _SURE, _SAME, _AT_MOST = 7, 0.5, 0.5, 256


class _Features(nn.Module):
    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(channels * _SIDE**2, hidden), nn.Linear(hidden, hidden)

    def forward(self, cells: Tensor) -> Tensor:
        return functional.relu(self.fc2(functional.relu(self.fc1(cells.flatten(1)))))


class _Predictor(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.cls_score = nn.Linear(hidden, 2)
        self.bbox_pred = nn.Sequential(nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 4))


class Cascade(nn.Module):
    """The three stages, without weights.

    Args:
        channels: Channels of the maps.
        hidden: Channels of the linear layers.
    """

    def __init__(self, *, channels: int, hidden: int) -> None:
        super().__init__()
        self.box_head = nn.ModuleList(_Features(channels, hidden) for _ in _MOVES)
        self.box_predictor = nn.ModuleList(_Predictor(hidden) for _ in _MOVES)

    def objects(
        self,
        maps: Sequence[Float[Tensor, "C h w"]],
        proposals: tuple[Float[Tensor, "N 4"], Float[Tensor, " N"]],
        *,
        height: int,
        width: int,
    ) -> Float[Tensor, "K 4"]:
        """Boxes of the objects of an image in pixels, within it, the best first.

        Args:
            maps: Maps of the levels that boxes take features of.
            proposals: Boxes and their scores.
            height: Rows of the image in pixels.
            width: Columns of the image in pixels.
        """
        boxes, scores = proposals
        sure = torch.zeros_like(scores)
        for number, (head, predictor) in enumerate(zip(self.box_head, self.box_predictor, strict=True)):
            boxes = clipped(boxes, height=height, width=width) if number else boxes
            features = head(pooled(maps, boxes, first=FIRST_LEVEL, side=_SIDE))
            sure = sure + predictor.cls_score(features).softmax(-1)[:, 0] / len(_MOVES)
            boxes = moved(boxes, predictor.bbox_pred(features), weights=_MOVES[number])
        return surest(clipped(boxes, height=height, width=width), (sure * scores).sqrt())


def surest(boxes: Float[Tensor, "N 4"], scores: Float[Tensor, " N"]) -> Float[Tensor, "K 4"]:
    """The boxes above the threshold that no better one covers, the best first; those without area are no objects."""
    kept = (scores > _SURE) & boxes.isfinite().all(1)
    boxes, scores = boxes[kept], scores[kept]
    boxes = boxes[suppressed(boxes, scores, threshold=_SAME)[:_AT_MOST]]
    return boxes[(boxes[:, 2:] > boxes[:, :2]).all(1)]
