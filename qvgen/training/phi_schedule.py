"""The ranks of Phi over a run, as a configuration asks for them."""

from __future__ import annotations

from qvgen.config.schema import TrainConfig
from qvgen.lowrank.decay import DecaySchedule, halving_ranks


def phi_ranks(config: TrainConfig) -> tuple[int, ...]:
    """Rank of Phi in each phase; empty for a method without Phi."""
    if not config.method.uses_phi:
        return ()
    return config.phi.ranks or halving_ranks(config.phi.rank, decay=config.phi.decay)


def decay_schedule(config: TrainConfig) -> DecaySchedule | None:
    """The steps at which the rank of Phi falls; None for a method without it.

    Raises:
        ValueError: There are fewer steps than phases.
    """
    ranks = phi_ranks(config)
    if not ranks:
        return None
    return DecaySchedule(
        ranks=ranks,
        num_steps=config.steps,
        tail_share=config.phi.tail_share,
        anneal=config.phi.anneal,
        drop=config.phi.drop,
    )
