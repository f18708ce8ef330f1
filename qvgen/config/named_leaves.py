"""Sections of several objects, each under a name of its own: Lightning callbacks, and loggers beside ours.

    callbacks:                                              logger:
      early:                                                  name: wandb
        _target_: lightning.pytorch.callbacks.EarlyStopping   tensorboard:
        monitor: val/relative_error                             _target_: lightning.pytorch.loggers.TensorBoardLogger

A section that itself has a ``_target_`` is one object. Whose classes are followed is as for all leaves
(:mod:`qvgen.config.leaves`). What would change how a run ends, continues or computes is refused with the reason.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import fields
from typing import Any

from qvgen.config.leaf_class import check_made
from qvgen.config.leaf_file import leaf_content
from qvgen.config.leaves import build_leaf
from qvgen.config.schema.sections import LoggerConfig
from qvgen.errors import UserError, one_line, unknown_key

NAMED_GROUPS: Mapping[str, str] = {
    "callbacks": "lightning.pytorch.callbacks.Callback",
    "logger": "lightning.pytorch.loggers.Logger",
}
"""Sections of named objects -> the class of each of them."""

_LOGGER_KEYS = tuple(field.name for field in fields(LoggerConfig) if field.name != "further")

_WEIGHTS = "training changes the weights by its method alone, which has to know of Phi and of the quantizers"
_STEPS = "the samples of an optimizer step are given by batch_size and accumulate"
_BAR = "the bar is qvgen's own, and lines where stderr is no terminal"
REFUSED_CALLBACKS: Mapping[str, str] = {
    "Checkpoint": "a run is continued from its own checkpoints alone; write checkpoint.every_steps=..., checkpoint.keep=...",
    "Timer": "a clock would decide which model comes out; a signal ends a run with everything saved (resume=true)",
    "GradientAccumulationScheduler": _STEPS,
    "BatchSizeFinder": f"{_STEPS}; dry_run=true says what fits",
    "LearningRateFinder": "write optim.learning_rate=..., or a sweep of it with -m",
    "StochasticWeightAveraging": _WEIGHTS,
    "WeightAveraging": _WEIGHTS,
    "ModelPruning": _WEIGHTS,
    "BaseFinetuning": _WEIGHTS,
    "ProgressBar": _BAR,
    "ModelSummary": "the start of a run and its report say what was quantized",
    "BasePredictionWriter": "a run has no loop of predictions",
}
"""Lightning's callbacks that a run does not take, those that derive from them too -> why, and what to do instead."""


def split_logger(section: object) -> object:
    """The section ``logger`` with its further loggers under ``further``; what is no section is left for others to refuse.

    Raises:
        UserError: A key that is neither one of ours nor a logger with a ``_target_``.
    """
    if not isinstance(section, Mapping) or "further" in section:
        return section
    if "_target_" in section:
        return {**leaf_content("logger", "csv"), "further": {"logger": dict(section)}}
    further = {key: value for key, value in section.items() if key not in _LOGGER_KEYS}
    for key, value in further.items():
        if not isinstance(value, Mapping):
            raise unknown_key(f"logger.{key}", [f"logger.{other}" for other in _LOGGER_KEYS])
    return {**{key: section[key] for key in _LOGGER_KEYS if key in section}, "further": further}


def named_sections(group: str, section: object) -> dict[str, Mapping[str, Any]]:
    """The sections with a ``_target_`` that a section of named objects holds, by their dotted keys; null ones are left out.

    Raises:
        UserError: One of them has no ``_target_``.
    """
    if section is None:
        return {}
    if not isinstance(section, Mapping):
        raise UserError(f"{group}={section} is a section; write +{group}.NAME._target_=...")
    if "_target_" in section:
        return {group: section}
    found = {f"{group}.{name}": value for name, value in section.items() if value is not None}
    for key, value in found.items():
        if not isinstance(value, Mapping) or "_target_" not in value:
            raise UserError(f"{key} has no _target_; write +{key}._target_=... and the class's arguments")
    return found


def build_named(group: str, section: object, *, trusted: Collection[str]) -> tuple[Any, ...]:
    """Build the objects of a section, in its order.

    Args:
        group: ``callbacks`` or ``logger``.
        section: Plain; see :func:`named_sections`.
        trusted: Classes that the command names itself.

    Raises:
        UserError: See :func:`qvgen.config.leaves.build_leaf`; a class that refuses its arguments or makes something else;
            one that a run does not take.
    """
    built = []
    for key, spec in named_sections(group, section).items():
        try:
            made = build_leaf(spec, key=key, trusted=trusted)
        except UserError:
            raise
        except Exception as error:  # the code of whoever wrote the class, which may raise anything
            raise UserError(f"{key}: {spec['_target_']} can't be made: {one_line(error)}") from error
        check_made(made, kind=NAMED_GROUPS[group], key=key, target=str(spec["_target_"]))
        for base in type(made).__mro__:
            if base.__module__.startswith("lightning.") and base.__name__ in REFUSED_CALLBACKS:
                raise UserError(f"{key}: {type(made).__name__} is not taken: {REFUSED_CALLBACKS[base.__name__]}")
        built.append(made)
    return tuple(built)
