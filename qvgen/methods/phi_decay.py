"""The decay of Phi while a student is trained (QVGen, arXiv 2505.11497, Sec. 3.3), as a method's schedule."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from qvgen.config.schema.sections import PhiConfig
from qvgen.layers.swap import quantized_layers
from qvgen.lowrank.decay import DecaySchedule, halving_ranks
from qvgen.lowrank.sharded import keeper_of


def decay_ranks(phi: PhiConfig) -> tuple[int, ...]:
    """Rank of Phi in each phase: the listed ones, or those that ``decay`` gives from ``rank`` on.

    Where Phi is kept the last one is what stays: all of it where ``decay`` is 0.

    Example:
        >>> from qvgen.config.defaults import load_section
        >>> decay_ranks(load_section("phi", rank=8, keep=False))
        (8, 4, 2, 1)
        >>> decay_ranks(load_section("phi", rank=48, keep=True))
        (48, 24, 16)
    """
    ranks = phi.ranks or halving_ranks(phi.rank, decay=phi.decay)
    if not phi.keep or (not phi.decay and phi.ranks is None):
        return ranks
    above = tuple(rank for rank in ranks if rank > phi.keep_rank)
    return (*above, min(phi.keep_rank, ranks[0]))


@dataclass(frozen=True)
class PhiDecay:
    """Brings every layer's Phi to the state of an optimizer step.

    Attributes:
        decay: Rank and gate of every step.
    """

    columns: ClassVar[tuple[str, ...]] = ("phi/rank", "phi/gamma_min")
    decay: DecaySchedule

    @classmethod
    def configured(cls, phi: PhiConfig, *, num_steps: int) -> PhiDecay:
        """The decay that a configuration asks for; raises ValueError where there are fewer steps than phases."""
        ranks = decay_ranks(phi)
        return cls(
            DecaySchedule(
                ranks=ranks[:-1] if phi.keep else ranks,
                kept=ranks[-1] if phi.keep else 0,
                num_steps=num_steps,
                tail_share=phi.tail_share,
                anneal=phi.anneal,
                drop=phi.drop,
            )
        )

    @property
    def phases(self) -> tuple[tuple[int, int], ...]:
        """(rank, first step with it); the last one is the tail's, if there is one: 0, or what is kept."""
        found = tuple(zip((*self.decay.ranks, self.decay.kept), self.decay.boundaries, strict=True))
        return found if found[-1][1] < self.decay.num_steps else found[:-1]

    def apply_(self, student: nn.Module, optimizer: torch.optim.Optimizer | None, *, step: int) -> None:
        """Advance all layers to a step; where L and R were rewritten, forget their moments."""
        for name, layer in quantized_layers(student).items():
            state = self.decay.at(step, layer=name)
            if layer.phi is not None and layer.phi.advance_(state) and optimizer is not None:
                forget_moments_(optimizer, layer.phi.left)
                forget_moments_(optimizer, layer.phi.right)

    def metrics(self, step: int) -> Mapping[str, float | int]:
        """Rank and smallest gate during a step."""
        state = self.decay.at(step)
        return {"phi/rank": state.rank, "phi/gamma_min": min(state.gate, default=0.0)}


@torch.no_grad()
def forget_moments_(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> None:
    """Set the moments and the step count of a parameter to 0, in place: it now means something else."""
    if (keeper := keeper_of(parameter)) is not None:
        keeper.forget_moments_(parameter)
        return
    for value in optimizer.state.get(parameter, {}).values():
        if isinstance(value, torch.Tensor):
            value.zero_()
