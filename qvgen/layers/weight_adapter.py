"""A low-rank change of a layer's master weight that is merged before quantization (LoRA, arXiv 2106.09685).

    W' = W + (s B) (s A)        B [N, r] = 0 at the start, A [r, K]        Y = Q(X) Q(W')^T + bias

W is left alone and may be frozen; the grid rounds the sum, so that nothing is left of the factors in the packed layer. They
are in units of s, the mean step of the weight's grid where training starts: a gradient of theirs is s times that of the
plain factors, and a step of Adam, which does not see how large gradients are, moves s B and s A by s times the learning rate
(EfficientDM, arXiv 2310.03270). Layers with coarse grids are moved further, as they have to be before a code changes.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from qvgen.layers.fake_quant_linear import FakeQuantLinear


class WeightAdapter(nn.Module):
    """The change of a weight [N, K] by two factors.

    Attributes:
        left: Parameter float32 [N, r], B in units of ``unit``.
        right: Parameter float32 [r, K], A in units of ``unit``.
        unit: buffer float32 [], s.
    """

    left: nn.Parameter
    right: nn.Parameter
    unit: Tensor

    def __init__(self, *, out_features: int, in_features: int, rank: int) -> None:
        super().__init__()
        self.left = nn.Parameter(torch.zeros(out_features, rank))
        self.right = nn.Parameter(torch.zeros(rank, in_features))
        self.register_buffer("unit", torch.ones(()))

    @torch.no_grad()
    def start_(self, *, unit: Tensor, generator: torch.Generator) -> None:
        """Begin without a change: B = 0, A uniform within 1 / sqrt(K), as peft starts its adapters.

        Args:
            unit: float32 [], s > 0.
            generator: On the CPU: the same draw on every device.
        """
        drawn = torch.empty(self.right.shape).uniform_(-1.0, 1.0, generator=generator) / math.sqrt(self.right.shape[1])
        self.unit.copy_(unit)
        self.left.zero_()
        self.right.copy_(drawn.to(self.right.device) / self.unit)

    def forward(self, weight: Tensor) -> Tensor:
        """W', float32 [N, K], for W float32 [N, K]; products of masters are not rounded to autocast's type."""
        with torch.autocast(weight.device.type, enabled=False):
            return weight + (self.unit * self.left) @ (self.unit * self.right)

    def extra_repr(self) -> str:
        """Rank for ``print(model)``."""
        return f"rank={self.left.shape[1]}"


def merged_weight(layer: FakeQuantLinear) -> Tensor:
    """The weight that a layer quantizes, float32 [N, K]: its master weight, changed by the adapter if it has one."""
    if layer.adapter is None:
        return layer.weight
    merged: Tensor = layer.adapter(layer.weight)
    return merged


@torch.no_grad()
def merge_(layer: FakeQuantLinear) -> None:
    """Make the merged weight the layer's master weight, in place, and take the adapter away; nothing without one."""
    layer.weight.copy_(merged_weight(layer))
    layer.adapter = None
