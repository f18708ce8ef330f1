"""Which captions are sampled."""

from __future__ import annotations

from qvgen.config.prompt import Prompts
from qvgen.config.schema import TrainConfig


def evaluation_prompts(config: TrainConfig) -> Prompts:
    """The prompts of videos that are looked at: ``evaluation.prompts``, else the model's own captions."""
    return config.evaluation.prompts or Prompts.of(config.model.prompts)


def calibration_prompts(config: TrainConfig) -> Prompts:
    """The prompts that calibration samples from: ``calibration.prompts``, else those of the evaluation."""
    return config.calibration.prompts or evaluation_prompts(config)
