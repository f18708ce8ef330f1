"""The section ``ema``: an average of the student over its last steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from qvgen.config.schema.value_range import Range, check_ranges


@dataclass(frozen=True, kw_only=True)
class EmaConfig:
    """An exponential moving average of all that is trained, in float32 (:mod:`qvgen.training.callbacks.average`).

    Attributes:
        decay: Share of itself that the average keeps in each step, for example 0.999; in its first steps less, (1 + n) /
            (10 + n) after n of them. The average begins again where Phi's rank falls. None: there is no average.
        host: Keep it in the host's memory.
        fold: True measures, samples and folds the average in place of the student; False keeps it in the checkpoints alone.
    """

    decay: Annotated[float | None, Range("(0, 1)", write="0.999")]
    host: bool
    fold: bool

    def __post_init__(self) -> None:
        check_ranges(self, section="ema")


NO_AVERAGE = EmaConfig(decay=None, host=False, fold=True)
"""The section of a training that is told nothing: there is no average."""
