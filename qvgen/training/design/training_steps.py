"""The optimizer steps of a training: how many, of which batches, at which rates."""

from __future__ import annotations

from dataclasses import dataclass, field

from qvgen.config.defaults import load_section
from qvgen.config.schema.loss import LossConfig
from qvgen.config.schema.sections import OptimConfig
from qvgen.training.design.micro_batch import StepBatch


def _default_loss() -> LossConfig:
    loss: LossConfig = load_section("loss")
    return loss


@dataclass(frozen=True, kw_only=True)
class TrainingSteps:
    """The optimizer steps of a training.

    Attributes:
        num_steps: Optimizer steps.
        batch: Samples of each of them.
        optim: The optimizer and its schedule.
        loss: Noise levels, their weights, and blocks that are compared; by default those of conf/train.yaml.
        seed: Seed of the order of samples, of noise levels, noises and dropout.
    """

    num_steps: int
    batch: StepBatch
    optim: OptimConfig
    seed: int
    loss: LossConfig = field(default_factory=_default_loss)
