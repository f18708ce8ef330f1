"""Leaves: the objects that a `_target_` names, and whose `_target_` is followed.

A class of ours or of an installed plug-in is followed where a file of its group names it: a configuration that came
with a run can choose among the leaves of that group and give them other arguments, but names neither another function of
this package nor code of its own. Any other class is the user's, and followed where they named it in this very command: on the
command line, or in a file of their ``--config-dir``. Arguments are plain values of the types that the leaf asks for.
"""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Collection, Mapping, Sequence
from dataclasses import is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from qvgen.config.bits import Bits
from qvgen.config.conf_folder import conf_directory
from qvgen.config.leaf_class import check_made, find_class
from qvgen.config.leaf_file import group_targets, leaf_names, leaf_target, read_leaf, users_targets
from qvgen.config.plain_json import whole
from qvgen.config.schema.export import ExportConfig
from qvgen.config.schema.imports import ImportConfig
from qvgen.config.schema.train import TrainConfig
from qvgen.config.schema.verbs import PrecomputeConfig
from qvgen.errors import OWN_PACKAGES, UserError, did_you_mean, one_line, unknown_key

__all__ = [
    "LEAF_GROUPS",
    "build_leaf",
    "build_leaves",
    "check_type",
    "conf_directory",
    "group_targets",
    "leaf_names",
    "load_foreign_leaf",
    "load_leaf",
    "load_profile",
]

LEAF_GROUPS: Mapping[str, str] = {
    "model": "qvgen.models.base.VideoDiT",
    "profile": "qvgen.quant.grid.Profile",
    "method": "qvgen.methods.base.Method",
    "init": "qvgen.initializers.base.Initializer",
    "data": "qvgen.data.source.DataSource",
    "export": "qvgen.deploy.exporters.base.Target",
    "metric": "qvgen.evaluation.metrics.base.Metric",
    "suite": "qvgen.evaluation.suite.metric_list.Suite",
}
"""Groups whose sections are built by their `_target_` -> the class or protocol of what is built."""

MAX_FOREIGN_SIZE = 2**16
"""Largest size or count that is taken from a file: pixels, frames, steps, layers."""


def build_leaf(spec: Mapping[str, Any], *, key: str, trusted: Collection[str] = ()) -> Any:
    """Build the object that a section with a `_target_` describes.

    Args:
        spec: ``{"_target_": "qvgen.methods.lsq.LSQ", argument: value, ...}``; plain values only.
        key: The section's name, for messages.
        trusted: Classes of the user's own that they named themselves, beside the leaves of the group.

    Raises:
        UserError: No `_target_` or one that is neither a leaf of this group nor trusted, also anywhere below; an unknown or
            missing argument, or one of another type; a class that makes something else than the group's leaves are.
        ValueError: Whatever the class itself refuses.
    """
    arguments = dict(spec)
    name = arguments.pop("_target_", None)
    target = _find(name, key=key, trusted=trusted)
    known, open_ended = _parameters(target, key=key)
    hints = _hints(target)
    for argument, value in arguments.items():
        if argument not in known and not open_ended:
            raise unknown_key(f"{key}.{argument}", [f"{key}.{other}" for other in known])
        if _names_target(value):
            raise UserError(f"{key}.{argument} holds a _target_; only {key} itself has one")
        check_type(value, hints.get(argument, Any), key=f"{key}.{argument}")
    for argument, parameter in known.items():
        if parameter.default is inspect.Parameter.empty and argument not in arguments:
            raise UserError(f"{key}.{argument} is missing; write {key}.{argument}=...")
    made = target(**arguments)
    if key in LEAF_GROUPS and str(name).partition(".")[0] not in OWN_PACKAGES:
        check_made(made, kind=LEAF_GROUPS[key], key=key, target=str(name))
    return made


def load_leaf(group: str, name: str, /, **changes: Any) -> Any:
    """Build the object of a file ``GROUP/NAME.yaml``, for example ``("model", "tiny")``; see :mod:`qvgen.config.leaf_file`.

    Args:
        group: Folder of conf/.
        name: File of that folder; it alone decides which class is built.
        **changes: Arguments in place of the file's values.

    Raises:
        UserError: There is no such file, or the class has no such argument.
    """
    spec = read_leaf(group, name)
    if "_target_" in changes:
        raise UserError(f"{group}={name}: _target_={changes['_target_']} is not an argument; the name decides")
    return build_leaf(_without_recipe({**spec, **changes}), key=group, trusted=users_targets(group, name))


def load_profile(name: str, bits: Bits) -> Any:
    """Build the grids of ``conf/profile/NAME.yaml`` with these bits; raises UserError where there is no such file."""
    spec = read_leaf("profile", name, resolve=False)  # its bits are the run's, which there is none of here
    changed = {**spec, "weight_bits": bits.weight, "activation_bits": bits.activation}
    return build_leaf(changed, key="profile", trusted=users_targets("profile", name))


Config = TypeVar("Config", bound=TrainConfig | PrecomputeConfig | ExportConfig | ImportConfig)


def build_leaves(config: Config, *, trusted: Collection[str] = ()) -> Config:
    """Replace the plain leaf sections of a configuration by the objects that they describe.

    Args:
        config: With plain sections.
        trusted: See :func:`build_leaf`.

    Raises:
        ValueError: See :func:`build_leaf`.
    """
    groups = [group for group in LEAF_GROUPS if hasattr(config, group)]
    if isinstance(config, TrainConfig):
        groups.remove("export")  # it may be several (qvgen.config.run_exports)
    built = {group: build_leaf(_without_recipe(getattr(config, group)), key=group, trusted=trusted) for group in groups}
    return replace(config, **built)


def _without_recipe(spec: Mapping[str, Any]) -> dict[str, Any]:
    """A model's section without `recipe`: defaults of steps, batch size and learning rate, used by conf/ alone."""
    return {name: value for name, value in spec.items() if name != "recipe"}


def load_foreign_leaf(group: str, name: str, arguments: Mapping[str, Any], *, source: str) -> Any:
    """:func:`load_leaf` with arguments out of a file that somebody else may have written.

    Args:
        group: Folder of conf/.
        name: File of that folder.
        arguments: In place of the file's values; whole numbers are sizes and counts, from 1 to 65 536.
        source: The file that they come from, for messages.

    Raises:
        UserError: Names the source: the group has no such file, or its class can't be built with these arguments.
    """
    try:
        target = leaf_target(group, name)
        hints = _hints(_find(target, key=group, trusted=users_targets(group, name)))
        for key, value in arguments.items():
            if hints.get(key) is int:
                whole(value, f"{group}.{key}", low=1, high=MAX_FOREIGN_SIZE)
        return load_leaf(group, name, **arguments)
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
        raise UserError(f"{source}: {group}={name} can't be built as it says: {one_line(error)}") from error


def check_type(value: Any, hint: Any, *, key: str) -> None:
    """Raise UserError unless a plain value is of an annotated type; an annotation that is of no plain type takes any."""
    if not _fits(value, hint):
        raise UserError(
            f"{key}={'null' if value is None else value!r:.60} is of the wrong type; give {_described(hint)}"
        )


def _fits(value: Any, hint: Any) -> bool:
    origin, arguments = typing.get_origin(hint) or hint, typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, kind) for kind in arguments)
    if origin is typing.Literal:  # which of the values, the leaf itself says best
        return isinstance(value, tuple(map(type, arguments)))
    if origin in (list, tuple, Sequence):
        return isinstance(value, list | tuple) and all(_fits(entry, arguments[0]) for entry in value if arguments)
    if origin in (dict, Mapping):
        return isinstance(value, Mapping) and all(_fits(entry, arguments[1]) for entry in value.values() if arguments)
    if origin in (int, float):
        kinds = int if origin is int else int | float
        return isinstance(value, kinds) and not isinstance(value, bool) and value == value
    plain = {bool: bool, str: str, Path: str | Path, types.NoneType: types.NoneType}
    return isinstance(value, plain[origin]) if origin in plain else True


def _described(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint).replace("typing.", "")


def _parameters(target: Any, *, key: str) -> tuple[dict[str, inspect.Parameter], bool]:
    """The arguments that a leaf takes by name, and whether it takes any others too."""
    try:
        parameters = inspect.signature(target).parameters
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{key}: the arguments of {target!r} can't be read; name a class or function of Python"
        ) from error
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    known = {name: parameter for name, parameter in parameters.items() if parameter.kind not in variable}
    return known, any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())


def _hints(target: Any) -> dict[str, Any]:
    """Types of a leaf's arguments; of a dataclass those of its fields, each from the module that declares it."""
    kind = target if is_dataclass(target) or not inspect.isclass(target) else target.__init__
    try:
        return typing.get_type_hints(kind)
    except (NameError, AttributeError, TypeError):
        if target.__module__.partition(".")[0] in OWN_PACKAGES:
            raise
        return {}  # of a user's class: names that only a type checker imports


def _names_target(value: Any) -> bool:
    if isinstance(value, Mapping):
        return "_target_" in value or any(map(_names_target, value.values()))
    return isinstance(value, list | tuple) and any(map(_names_target, value))


def _find(name: object, *, key: str, trusted: Collection[str] = ()) -> Any:
    if not isinstance(name, str):
        raise UserError(f"{key} has no _target_; choose one of the files in conf/{key}")
    leaves = group_targets(key)
    is_ours = name.partition(".")[0] in (*OWN_PACKAGES, "")
    if name in leaves or (name in trusted and not is_ours):
        return find_class(name, key=key, is_users=name not in leaves)
    if is_ours:
        raise UserError(
            f"{key}._target_={name} is no {key} of qvgen{did_you_mean(name, leaves)} (there are: {', '.join(leaves)})"
        )
    raise UserError(
        f"{key}._target_={name} is no {key} of qvgen or of a plug-in{did_you_mean(name, leaves)}; a class of your own is "
        "followed where this command names it: on the command line, or in a file of its --config-dir (docs/extending.md)"
    )
