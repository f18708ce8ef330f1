"""Full-precision training on the data's own target: how the small teacher was made."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from qvgen.methods.base import CaptionDropout, Method, Trains


@dataclass(frozen=True, kw_only=True)
class Pretrain(Method):
    """No quantization, no teacher: mean |v - target|^2.

    Attributes:
        caption_dropout: Probability that a sample loses its caption, for classifier-free guidance.
    """

    trains: ClassVar[Trains] = "transformer"
    caption_dropout: CaptionDropout = 0.1
    share_activations: Literal[False] = field(default=False, init=False)
