"""ViDiT-Q (arXiv 2406.02540): static-dynamic channel balancing, then a random rotation of the whole row.

All of it is :mod:`qvgen.initializers.balanced_rotation`, with the same bits for every layer. Which layers stay in full
precision (the paper: embedders, adaLN, the last one) is ``model.exclude``.
"""

from __future__ import annotations

from dataclasses import dataclass

from qvgen.initializers.balanced_rotation import BalancedRotation


@dataclass(frozen=True, kw_only=True)
class ViditQ(BalancedRotation):
    """Balancing, rotation and range search."""
