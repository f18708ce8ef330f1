"""LSQ and LSQ+ (arXiv 1902.08153, 2004.09576): learned scales and zero points, straight-through rounding, no helper."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from qvgen.methods.base import Target, check_dropout


@dataclass(frozen=True, kw_only=True)
class LSQ:
    """Quantization-aware training on the data's own loss, as published; or distilled.

    Attributes:
        distill: True trains against the full-precision teacher instead of the data's target.
        caption_dropout: Probability that a sample loses its caption.
        share_activations: True: layers that read the same input (q, k and v) learn one range of it, so that the packed
            model quantizes it once; False: each layer learns its own.
    """

    distill: bool = False
    caption_dropout: float = 0.05
    share_activations: bool = True
    name: Literal["lsq"] = field(default="lsq", init=False)
    quantizes: Literal[True] = field(default=True, init=False)
    uses_phi: Literal[False] = field(default=False, init=False)

    def __post_init__(self) -> None:
        check_dropout(self.caption_dropout)

    @property
    def target(self) -> Target:
        """Teacher or data."""
        return "teacher" if self.distill else "data"
