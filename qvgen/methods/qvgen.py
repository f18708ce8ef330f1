"""QVGen (arXiv 2505.11497): distillation from the full-precision teacher, with Phi that decays to nothing."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from qvgen.methods.base import Target, check_dropout


@dataclass(frozen=True, kw_only=True)
class QVGen:
    """Loss mean |v_student - v_teacher|^2 on the final prediction; everything in the student is trained.

    Attributes:
        phi: False is the paper's ablation without the helper: plain distillation on learned scales.
        caption_dropout: Probability that a sample loses its caption.
        share_activations: True: layers that read the same input (q, k and v) learn one range of it, so that the packed
            model quantizes it once; False: each layer learns its own.
    """

    phi: bool = True
    caption_dropout: float = 0.05
    share_activations: bool = True
    name: Literal["qvgen"] = field(default="qvgen", init=False)
    quantizes: Literal[True] = field(default=True, init=False)
    target: Target = field(default="teacher", init=False)

    def __post_init__(self) -> None:
        check_dropout(self.caption_dropout)

    @property
    def uses_phi(self) -> bool:
        """Whether layers carry Phi."""
        return self.phi
