"""Full-precision training on the data's own target: how the small teacher was made."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from qvgen.methods.base import Target, check_dropout


@dataclass(frozen=True, kw_only=True)
class Pretrain:
    """No quantization, no teacher: mean |v - target|^2.

    Attributes:
        caption_dropout: Probability that a sample loses its caption, for classifier-free guidance.
    """

    caption_dropout: float = 0.1
    name: Literal["pretrain"] = field(default="pretrain", init=False)
    quantizes: Literal[False] = field(default=False, init=False)
    uses_phi: Literal[False] = field(default=False, init=False)
    target: Target = field(default="data", init=False)
    share_activations: Literal[False] = field(default=False, init=False)

    def __post_init__(self) -> None:
        check_dropout(self.caption_dropout)
