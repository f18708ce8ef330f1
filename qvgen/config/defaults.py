"""Sections with the defaults of conf/, for callers from Python who have no whole configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import InterpolationKeyError

from qvgen.config.conf_folder import conf_directory
from qvgen.config.leaf_file import leaf_content
from qvgen.config.schema.ema import EmaConfig
from qvgen.config.schema.loss import LossConfig
from qvgen.config.schema.sections import (
    ActivationSwitchConfig,
    CalibrationConfig,
    CheckpointConfig,
    EvaluationConfig,
    OptimConfig,
    PhiConfig,
)
from qvgen.config.schema.strategy import StrategyConfig
from qvgen.config.schema.trainer import TrainerConfig
from qvgen.config.typed import from_plain
from qvgen.errors import UserError, did_you_mean

SECTIONS: Mapping[str, type] = {
    "phi": PhiConfig,
    "optim": OptimConfig,
    "loss": LossConfig,
    "strategy": StrategyConfig,
    "ema": EmaConfig,
    "trainer": TrainerConfig,
    "checkpoint": CheckpointConfig,
    "calibration": CalibrationConfig,
    "activation_switch": ActivationSwitchConfig,
    "evaluation": EvaluationConfig,
}
"""Sections of a training run that parts of the library take -> their classes."""


def load_section(section: str, /, **changes: Any) -> Any:
    """A section of a run's configuration with the values that `qvgen train` would have.

    Args:
        section: One of :data:`SECTIONS`.
        **changes: Values in place of the defaults, as a configuration file would have them.

    Raises:
        UserError: There is no such section or key; a value that is no good; a default that a model's recipe decides, which is
            to be given then.

    Example:
        >>> load_section("phi", rank=4).decay, load_section("calibration", videos=1).steps
        (0.5, 10)
        >>> load_section("optim")
        Traceback (most recent call last):
            ...
        qvgen.errors.UserError: optim.learning_rate has no default without a model's recipe; write learning_rate=...
    """
    if section not in SECTIONS:
        raise UserError(
            f"unknown section {section!r}{did_you_mean(section, SECTIONS)} (there are: {', '.join(SECTIONS)})"
        )
    root = OmegaConf.create({section: {**_defaults(section), **changes}})
    values = {}
    for key in root[section]:
        try:
            value = root[section][key]
        except InterpolationKeyError as error:
            raise UserError(f"{section}.{key} has no default without a model's recipe; write {key}=...") from error
        values[str(key)] = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
    return from_plain(SECTIONS[section], values, key=section)


def _defaults(section: str) -> dict[str, Any]:
    """The section as it stands in conf/train.yaml, or in the file of its group that is chosen there."""
    content = OmegaConf.to_container(OmegaConf.load(conf_directory() / "train.yaml"))
    assert isinstance(content, dict), "our own file is a mapping"
    if section in content:
        return dict(content[section])
    chosen = {key: value for entry in content["defaults"] if isinstance(entry, dict) for key, value in entry.items()}
    return leaf_content(section, chosen[section])
