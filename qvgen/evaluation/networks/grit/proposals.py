"""CenterNet2's first stage (arXiv 2103.07461): where in an image anything might be, whatever it is.

    each of five maps -> 4 x (3 x 3 convolution, group norm, ReLU) -> how likely an object has its center here,
                                                                      and its four sides' distances from here
    the 1000 likeliest of each map, above 0.0001 -> boxes -> NMS at an IoU of 0.9 -> the 256 likeliest

A place (i, j) of a map of stride s lies at (s i + s / 2, s j + s / 2); distances are in strides. A score is the root of the
likelihood. Modules have the names of ``grit_b_densecap_objectdet.pth`` below ``proposal_generator``; the numbers are those of
its configuration.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from qvgen.evaluation.networks.grit.boxes import suppressed
from qvgen.evaluation.networks.grit.pyramid import STRIDES

_LIKELY, _OF_EACH_MAP, _SAME, _AT_MOST = 1e-4, 1000, 0.9, 256
_SMALLEST = 0.01


class _Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))


class _Head(nn.Module):
    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.bbox_tower = nn.Sequential(
            *(
                layer
                for _ in range(4)
                for layer in (
                    nn.Conv2d(channels, channels, 3, padding=1), nn.GroupNorm(groups, channels), nn.ReLU(),
                )
            )
        )  # fmt: skip
        self.bbox_pred, self.agn_hm = (nn.Conv2d(channels, outputs, 3, padding=1) for outputs in (4, 1))
        self.scales = nn.ModuleList(_Scale() for _ in STRIDES)


class CenterNet(nn.Module):
    """The first stage, without weights.

    Args:
        channels: Channels of the maps.
        groups: Groups of the normalization.
    """

    def __init__(self, *, channels: int, groups: int) -> None:
        super().__init__()
        self.centernet_head = _Head(channels, groups)

    def forward(self, maps: Sequence[Float[Tensor, "1 C h w"]]) -> tuple[Float[Tensor, "N 4"], Float[Tensor, " N"]]:
        """Boxes in pixels of one image, which may leave it, and their scores, the best first."""
        found = [self._of_map(features[:1], number) for number, features in enumerate(maps)]
        boxes, scores = (torch.cat(parts) for parts in zip(*found, strict=True))
        stay = suppressed(boxes, scores, threshold=_SAME)
        if len(stay) > _AT_MOST:  # all that are as good as the last one stay, too
            stay = stay[scores[stay] >= scores[stay[_AT_MOST - 1]]]
        return boxes[stay], scores[stay]

    def _of_map(self, features: Tensor, number: int) -> tuple[Tensor, Tensor]:
        head, stride = self.centernet_head, STRIDES[number]
        tower = head.bbox_tower(features)
        sides = functional.relu(head.bbox_pred(tower) * head.scales[number].scale)[0].flatten(1).T * stride
        likely = head.agn_hm(tower)[0, 0].sigmoid()
        rows, columns = (torch.arange(length, device=sides.device) * stride + stride // 2 for length in likely.shape)
        y, x = torch.meshgrid(rows, columns, indexing="ij")
        centers = torch.stack((x, y), -1).flatten(0, 1)
        return candidates(likely.flatten(), centers, sides)


def candidates(
    likely: Float[Tensor, " P"], centers: Tensor, sides: Float[Tensor, "P 4"]
) -> tuple[Float[Tensor, "N 4"], Float[Tensor, " N"]]:
    """Boxes and scores of the likeliest places of a map.

    Args:
        likely: How likely an object has its center at a place, in [0, 1].
        centers: Places [P, 2] in pixels, across and then down.
        sides: Distances of the left, top, right and bottom side from the place in pixels, 0 or more.
    """
    chosen = (likely > _LIKELY).nonzero().flatten()
    if len(chosen) > _OF_EACH_MAP:
        chosen = chosen[likely[chosen].topk(_OF_EACH_MAP).indices]
    first = centers[chosen] - sides[chosen, :2]
    last = torch.maximum(centers[chosen] + sides[chosen, 2:], first + _SMALLEST)
    return torch.cat((first, last), 1), likely[chosen].sqrt()
