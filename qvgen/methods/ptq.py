"""No training: what the PTQ method chose is folded as it is. The method of ``qvgen ptq``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from qvgen.methods.base import CaptionDropout, Method, Trains


@dataclass(frozen=True, kw_only=True)
class PostTraining(Method):
    """See :class:`qvgen.methods.base.Method`."""

    trains: ClassVar[Trains] = "nothing"
    caption_dropout: CaptionDropout = field(default=0.0, init=False)
    share_activations: Literal[False] = field(default=False, init=False)
