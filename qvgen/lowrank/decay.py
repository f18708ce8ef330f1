"""When Phi loses rank: a pure function from the optimizer step to rank and gate (QVGen, Sec. 3.3).

The steps before the tail are cut into one phase for every entry of the list of ranks r_0 > r_1 > ... > r_last. In
phase i the rank is r_i; the gate of r_{i+1} columns is 1 and that of the others is u, which falls from exactly 1
(first step of the phase) to exactly 0 (last step). The next phase starts by dropping those columns. The last phase
takes all that is left, and the tail trains without Phi. Where a rank is kept, the last phase leaves that many columns and the
tail trains with them.

    cosine   u = (1 + cos(pi j / (n - 1))) / 2        step j of n in the phase
    linear   u = 1 - j / (n - 1)
    step     u = 1 while j / (n - 1) < 1/2, else 0        the mean of u is that of the others

A phase of one step has u = 0. Deviation from the released code, which leaves 2-3 steps after Phi is gone: the tail is a
share of the steps (docs/method.md).

Examples:
    >>> schedule = DecaySchedule(ranks=(4, 2), num_steps=10, tail_share=0.2, anneal="linear")
    >>> [(schedule.at(step).rank, round(schedule.at(step).annealed, 2)) for step in range(10)]
    [(4, 1.0), (4, 0.67), (4, 0.33), (4, 0.0), (2, 1.0), (2, 0.67), (2, 0.33), (2, 0.0), (0, 0.0), (0, 0.0)]
    >>> [round(gate, 2) for gate in schedule.at(1).gate]
    [1.0, 1.0, 0.67, 0.67]
"""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import Literal, get_args

from qvgen.config.schema.sections import PHI_DECAY, PhiTailShare
from qvgen.config.schema.value_range import check_ranges

Anneal = Literal["cosine", "linear", "step"]
Drop = Literal["smallest", "largest", "random"]


@dataclass(frozen=True, kw_only=True)
class DecayState:
    """The state of Phi during one optimizer step.

    Attributes:
        rank: Columns in use.
        gate: gamma of those columns, in their order (falling singular values): ``rank`` numbers in [0, 1].
        annealed: u, the gate of the columns that this phase takes away; 0.0 when Phi is gone.
    """

    rank: int
    gate: tuple[float, ...]
    annealed: float


def halving_ranks(rank: int, *, decay: float) -> tuple[int, ...]:
    """The list of ranks that loses a share ``decay`` (the paper's lambda) in every phase, down to nothing; of 0, one phase.

    Example:
        >>> halving_ranks(32, decay=0.5), halving_ranks(8, decay=1.0), halving_ranks(8, decay=0.0)
        ((32, 16, 8, 4, 2, 1), (8,), (8,))
    """
    if rank < 1:
        raise ValueError(f"phi.rank={rank} is not positive; use 1 or more")
    PHI_DECAY.check(decay, key="phi.decay")
    ranks = [rank]
    if not decay:
        return (rank,)
    # In decimal fractions: 1 - 0.8 is a little less than 0.2 in floating point, and 10 would lose 9.
    share = Fraction(str(decay))
    while (following := min(math.floor((1 - share) * ranks[-1]), ranks[-1] - 1)) > 0:
        ranks.append(following)
    return tuple(ranks)


@dataclass(frozen=True, kw_only=True)
class DecaySchedule:
    """The ranks of Phi over a whole run.

    Attributes:
        ranks: Rank of each phase, strictly falling and positive.
        num_steps: Optimizer steps of the run.
        tail_share: Share of the steps that trains without Phi at the end.
        anneal: Shape of u over a phase.
        drop: Which columns a phase takes away, by singular value (``largest`` and ``random`` are the paper's ablations).
        kept: Rank that is left after the phases, less than the last one's; 0: Phi goes. With a kept rank there may be no
            phase: the rank stays what it is.

    Raises:
        ValueError: A list that does not fall, or more phases than there are steps for.
    """

    ranks: Sequence[int]
    num_steps: int
    tail_share: PhiTailShare
    anneal: Anneal = "cosine"
    drop: Drop = "smallest"
    kept: int = 0

    def __post_init__(self) -> None:
        ranks = list(self.ranks)
        if min(ranks, default=self.kept) < 1:
            raise ValueError(f"phi.ranks={ranks} must be positive; for example [32,16,8,4,2,1]")
        if ranks and not 0 <= self.kept < ranks[-1]:
            raise ValueError(
                f"phi.keep_rank={self.kept} must be in 0..{ranks[-1] - 1}, below the last of phi.ranks={ranks}"
            )
        if any(later >= earlier for earlier, later in pairwise(ranks)):
            raise ValueError(f"phi.ranks={ranks} must fall from each to the next; for example [32,16,8,4,2,1]")
        check_ranges(self, section="phi")
        if self.anneal not in get_args(Anneal):
            raise ValueError(f"phi.anneal={self.anneal!r} is unknown; use cosine, linear or step")
        if self.drop not in get_args(Drop):
            raise ValueError(f"phi.drop={self.drop!r} is unknown; use smallest, largest or random")
        if self.decay_steps < len(ranks):
            raise ValueError(
                f"steps={self.num_steps} with phi.tail_share={self.tail_share} leave {self.decay_steps} steps for "
                f"{len(ranks)} phases of phi.ranks={ranks}; use more steps or fewer ranks"
            )

    @property
    def decay_steps(self) -> int:
        """Steps in which Phi loses rank: all but the tail."""
        return self.num_steps - math.ceil(self.tail_share * self.num_steps)

    @cached_property
    def boundaries(self) -> tuple[int, ...]:
        """First step of each phase, and of the tail."""
        phases = len(self.ranks)
        if not phases:
            return (0,)
        return tuple(index * self.decay_steps // phases for index in range(phases + 1))

    def at(self, step: int, *, layer: str = "") -> DecayState:
        """State of a layer's Phi during an optimizer step.

        Args:
            step: 0 is the first; any later than the last is the tail.
            layer: Its name, on which ``random`` columns depend, and nothing else.
        """
        if step < 0:
            raise ValueError(f"step={step} is negative; the first optimizer step is 0")
        phase = bisect_right(self.boundaries, step) - 1
        if phase >= len(self.ranks):
            return DecayState(rank=self.kept, gate=(1.0,) * self.kept, annealed=0.0)
        start, end = self.boundaries[phase : phase + 2]
        rank = self.ranks[phase]
        kept = self.ranks[phase + 1] if phase + 1 < len(self.ranks) else self.kept
        annealed = self._anneal(step - start, end - start)
        stays, fades = (1.0,) * kept, (annealed,) * (rank - kept)
        gate = fades + stays if self.drop == "largest" else stays + fades
        if self.drop == "random":
            gate = tuple(gate[place] for place in _random_order(rank, f"{layer}/{phase}"))
        return DecayState(rank=rank, gate=gate, annealed=annealed)

    def _anneal(self, index: int, length: int) -> float:
        if index == length - 1:
            return 0.0
        progress = index / (length - 1)
        if self.anneal == "step":
            return float(progress < 0.5)
        return 0.5 * (1.0 + math.cos(math.pi * progress)) if self.anneal == "cosine" else 1.0 - progress


@lru_cache(maxsize=4096)
def _random_order(count: int, key: str) -> tuple[int, ...]:
    """The numbers 0 .. count - 1 in an order that depends on the key alone, the same on every machine."""
    digests = [hashlib.blake2b(f"{key}/{index}".encode(), digest_size=8).digest() for index in range(count)]
    return tuple(sorted(range(count), key=digests.__getitem__))
