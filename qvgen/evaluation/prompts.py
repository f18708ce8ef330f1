"""Which captions are sampled."""

from __future__ import annotations

from qvgen.config.prompt import Prompts
from qvgen.config.schema import TrainConfig


def evaluation_prompts(config: TrainConfig) -> Prompts:
    """What is sampled to be looked at: ``evaluation.prompts``, else the model's own captions."""
    return config.evaluation.prompts or Prompts.of(config.model.prompts)


def calibration_prompts(config: TrainConfig) -> Prompts:
    """What calibration samples from: ``calibration.prompts``, else what the evaluation does."""
    return config.calibration.prompts or evaluation_prompts(config)
