"""No training: what the PTQ method chose is folded as it is. The method of ``qvgen ptq``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class PostTraining:
    """See :class:`qvgen.methods.base.Method`."""

    name: Literal["ptq"] = field(default="ptq", init=False)
    target: Literal["data"] = field(default="data", init=False)
    quantizes: Literal[True] = field(default=True, init=False)
    uses_phi: Literal[False] = field(default=False, init=False)
    caption_dropout: float = field(default=0.0, init=False)
    share_activations: Literal[False] = field(default=False, init=False)
