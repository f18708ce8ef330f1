"""The keys ``optim.tail*``: a last share of the steps with a learning rate of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from qvgen.config.schema.value_range import Range
from qvgen.errors import UserError


@dataclass(frozen=True, kw_only=True)
class LearningRateTail:
    """The end of the learning rate's schedule.

    Attributes:
        tail_share: Share of the steps, the last ones, that the learning rate has fallen to ``tail_rate`` for; as
            ``phi.tail_share`` it begins when Phi is gone. 0: no tail, the rate falls to 0 over the whole run.
        tail_rate: Learning rate at the tail's beginning as a share of its peak, for each group of parameters; 1: it does not
            fall before.
        tail: What the rate does in the tail: stay ``constant``, or fall to 0 by a ``cosine``.
    """

    tail_share: Annotated[float, Range("[0, 1]", write="0.1")]
    tail_rate: Annotated[float, Range("(0, 1]", write="0.1")]
    tail: Literal["constant", "cosine"]

    def check_tail(self, *, warmup_share: float) -> None:
        """Raise UserError for a tail that begins before the rate has risen."""
        if self.tail_share and self.tail_share + warmup_share > 1 + 1e-9:  # 0.9 + 0.1 may be a little more
            raise UserError(
                f"optim.tail_share={self.tail_share} begins before optim.warmup_share={warmup_share} ends; write "
                f"optim.tail_share={max(0.0, round(1 - warmup_share, 4))} or less"
            )
