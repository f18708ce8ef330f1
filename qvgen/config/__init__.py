"""The configuration, all that a user may set: the typed, checked configuration that every verb receives.

    conf/*.yaml + overrides --(compose.py: hydra)--> plain dict
    plain dict --(typed.py)--> frozen dataclasses (schema/)
    sections with a `_target_` --(leaves.py)--> the objects that they name
    conf/*.yaml + docstrings and types --(schema/field_docs.py, reference.py, help_page.py)--> docs/configuration.md, --help

Verbs and everything below them see the frozen dataclasses alone; hydra stays in compose.py and in the entry points.
"""

from qvgen.config.bits import Bits
from qvgen.config.schema.sections import (
    CheckpointConfig,
    EvaluationConfig,
    LoggerConfig,
    Names,
    OptimConfig,
    PhiConfig,
)
from qvgen.config.schema.strategy import StrategyConfig
from qvgen.config.schema.train import FoldConfig, TrainConfig
from qvgen.config.schema.verbs import GenerateConfig, InspectConfig
from qvgen.errors import UserError, did_you_mean

__all__ = [
    "Bits",
    "CheckpointConfig",
    "EvaluationConfig",
    "FoldConfig",
    "GenerateConfig",
    "InspectConfig",
    "LoggerConfig",
    "Names",
    "OptimConfig",
    "PhiConfig",
    "StrategyConfig",
    "TrainConfig",
    "UserError",
    "did_you_mean",
]
