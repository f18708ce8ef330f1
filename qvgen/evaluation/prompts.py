"""Which captions are sampled."""

from __future__ import annotations

from qvgen.config.prompts.prompt import PromptedVideo, Prompts
from qvgen.config.schema.sections import CalibrationConfig, EvaluationConfig
from qvgen.models.base import VideoDiT


def evaluation_prompts(evaluation: EvaluationConfig, family: VideoDiT) -> Prompts:
    """The prompts of videos that are looked at: ``evaluation.prompts``, else the model's own captions."""
    return evaluation.prompts or Prompts.of(family.prompts)


def calibration_prompts(calibration: CalibrationConfig, family: VideoDiT) -> Prompts:
    """The prompts that calibration samples from: ``calibration.prompts``, else the model's own captions.

    A run puts its evaluation's prompts where ``calibration.prompts`` is None.
    """
    return calibration.prompts or Prompts.of(family.prompts)


def shown_videos(evaluation: EvaluationConfig, family: VideoDiT, *, seed: int) -> list[PromptedVideo]:
    """The videos that a run shows: the evaluation's prompts in turn, again and again if need be.

    Args:
        evaluation: Prompts and number of videos.
        family: Its captions count where the evaluation names no prompts.
        seed: Seed of the first video; the next ones have the next numbers.
    """
    return evaluation_prompts(evaluation, family).in_turn(evaluation.videos, first_seed=seed)
