"""The optimizer steps of a training: how many, of which batches, at which rates."""

from __future__ import annotations

from dataclasses import dataclass

from qvgen.config.sections import OptimConfig
from qvgen.training.micro_batch import StepBatch


@dataclass(frozen=True, kw_only=True)
class TrainingSteps:
    """The optimizer steps of a training.

    Attributes:
        num_steps: Optimizer steps.
        batch: Samples of each of them.
        optim: The optimizer and its schedule.
        seed: Seed of the order of samples, of noise levels, noises and dropout.
    """

    num_steps: int
    batch: StepBatch
    optim: OptimConfig
    seed: int
