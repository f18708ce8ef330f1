"""Phi: the low-rank helper of a quantized Linear (QVGen, arXiv 2505.11497, Sec. 3.2 and 3.3).

    W_eff = Q(W) + (L * gamma) R          L [N, r], R [r, K], gamma [r]

Phi starts as the best rank-r approximation of the rounding residual W - Q(W), carries what the grid can't, and is
taken away while training: gamma of the columns to be dropped goes to 0, then the rest is decomposed again.

L and R are Parameters that keep their size and their storage for ever (new Parameters would break the reducers of
data-parallel training); dropped columns are zeros behind a gate of 0. They may be sharded over processes: taking columns
away is a collective then. gamma is a buffer: it is scheduled, not learned. ``active_rank`` counts the columns that are
still in use and is saved with the module.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from qvgen.lowrank.decay import DecayState
from qvgen.lowrank.sharded import whole, write_whole_
from qvgen.lowrank.svd import random_factors, refactor, truncated_svd

Start = Literal["svd", "random", "zero"]
"""The residual's largest singular directions; random ones with a product of the same size; or a product of 0, with a right
factor as for ``random`` (two zero factors would never get a gradient)."""


class Phi(nn.Module):
    """Low-rank helper with a rank gate.

    Attributes:
        left: Parameter float32 [N, r], the paper's L.
        right: Parameter float32 [r, K], the paper's R.
        rank_gate: buffer float32 [r], the paper's gamma.
        active_rank: buffer int64 [], columns in use.
        suspended: Leave Phi out for a measurement; not saved.
        keep: Whether it stays: it acts on the input before that is quantized, and folding makes a branch of it.
        on_input: Whether it acts on the input before that is quantized, as a Phi that stays does anyway.
        start: What :meth:`start_from_` does.

    Raises:
        ValueError: ``rank`` is not in 1..min(N, K).
    """

    left: nn.Parameter
    right: nn.Parameter
    rank_gate: Tensor
    active_rank: Tensor

    def __init__(self, *, out_features: int, in_features: int, rank: int, keep: bool = False) -> None:
        super().__init__()
        width = min(out_features, in_features)
        if not 1 <= rank <= width:
            raise ValueError(f"phi.rank={rank} is outside 1..{width} for a Linear {in_features} -> {out_features}")
        self.left = nn.Parameter(torch.zeros(out_features, rank))
        self.right = nn.Parameter(torch.zeros(rank, in_features))
        self.register_buffer("rank_gate", torch.ones(rank))
        self.register_buffer("active_rank", torch.tensor(rank))
        self._rank, self._has_rank = rank, True
        self.suspended = False
        self.keep = keep
        self.on_input = False
        self.start: Start = "svd"

    @property
    def active(self) -> bool:
        """Whether the layer has to add Phi: it has rank, and is not suspended."""
        return self._has_rank and not self.suspended

    @property
    def rank(self) -> int:
        """Columns in use: the value of ``active_rank`` without asking the device for it."""
        return self._rank

    @property
    def capacity(self) -> int:
        """Columns that were allocated: the rank at the start."""
        return self.left.shape[1]

    @torch.no_grad()
    def start_from_(self, residual: Tensor, *, generator: torch.Generator) -> None:
        """Set L R to the best approximation of ``residual`` [N, K], or as ``start`` says, and open all gates."""
        left, right = truncated_svd(residual, rank=self.capacity, generator=generator)
        if self.start != "svd":
            left, right = random_factors(left, right, generator=generator)
        if self.start == "zero":
            left = torch.zeros_like(left)
        self.left.copy_(left)
        self.right.copy_(right)
        self.rank_gate.fill_(1.0)
        self._set_rank(self.capacity)

    def weight(self) -> Tensor:
        """(L * gamma) R, float32 [N, K]."""
        return (self.left * self.rank_gate) @ self.right

    @torch.no_grad()
    def advance_(self, state: DecayState) -> bool:
        """Bring the module to a state of the schedule, between two optimizer steps. Safe to call again.

        At the first step of a phase the gated columns are exactly 0 and are dropped: what is left is decomposed
        again and written, sorted, into the first columns; all processes get the same bits.

        Returns:
            Whether L and R were rewritten (their optimizer moments belong to other columns then).
        """
        rewritten = state.rank < self._rank
        if rewritten:
            self._drop_to(state.rank)
        gate = torch.zeros_like(self.rank_gate)
        gate[: state.rank] = torch.tensor(state.gate, dtype=gate.dtype, device="cpu").to(gate.device)
        self.rank_gate.copy_(gate)
        return rewritten

    def _drop_to(self, rank: int) -> None:
        left, right = whole(self.left), whole(self.right)
        new_left, new_right = torch.zeros_like(left), torch.zeros_like(right)
        if rank:
            gated = left * self.rank_gate
            new_left[:, :rank], new_right[:rank] = refactor(gated[:, : self._rank], right[: self._rank], rank=rank)
        write_whole_(self.left, new_left)
        write_whole_(self.right, new_right)
        self._set_rank(rank)

    def _set_rank(self, rank: int) -> None:
        self.active_rank.fill_(rank)
        # A flag of its own: a compiled block is compiled again where a number that it asks for changes.
        self._rank, self._has_rank = rank, rank > 0

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._rank = int(self.active_rank)
        self._has_rank = self._rank > 0

    def extra_repr(self) -> str:
        """Shape and rank for ``print(model)``."""
        kept = ", kept" if self.keep else ""
        return f"rank={self._rank}/{self.capacity}{kept}, out={self.left.shape[0]}, in={self.right.shape[1]}"
