"""ViDiT-Q's metric-decoupled mixed precision (arXiv 2406.02540): each layer gets bits by what its rounding does to the video.

The numerics of a layer are ViDiT-Q's (:mod:`qvgen.initializers.balanced_rotation`), with the bits that the layer
got; :mod:`qvgen.initializers.bit_budget` says how they are chosen. Used on a single layer, the method is ``vidit_q``.

The paper publishes the idea and one map of bits. The allocator is ours, and so are windows of equal numbers of steps and
the substitutes for networks that are not there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qvgen.initializers.balanced_rotation import BalancedRotation
from qvgen.initializers.bit_budget import BitBudget
from qvgen.quant.runtime import Addition


@dataclass(frozen=True, kw_only=True)
class MixedPrecision(BitBudget, BalancedRotation):
    """ViDiT-Q with bits of its own for every layer: ``init=vidit_q_mp``.

    Attributes:
        alpha, seed, fold_smoothing: See :class:`~qvgen.initializers.balanced_rotation.BalancedRotation`.
        candidates, ...: See :class:`~qvgen.initializers.bit_budget.BitBudget`.
    """

    additions: ClassVar[frozenset[Addition]] = BalancedRotation.additions | {"widths"}

    def __post_init__(self) -> None:
        BalancedRotation.__post_init__(self)
        BitBudget.__post_init__(self)
