"""How alike a video's frames are by their features, as VBench's two consistencies measure it."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional


def consistency(features: Float[Tensor, "F D"]) -> float:
    """The mean over the frames behind the first of (max(0, cos to the frame before) + max(0, cos to the first)) / 2.

    Args:
        features: Any length, F >= 2.

    Returns:
        In [0, 1].
    """
    units = functional.normalize(features.double(), dim=1)
    before, first = (units[1:] * units[:-1]).sum(1), (units[1:] * units[:1]).sum(1)
    return float((before.clamp(0, 1) + first.clamp(0, 1)).mean() / 2)
