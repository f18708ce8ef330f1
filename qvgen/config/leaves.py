"""Leaves: the objects that a `_target_` of conf/ names, and the folder conf/ itself.

A section of group X is built only by what a file of conf/X names: a configuration that came with a run, or that a user
wrote, can choose among the leaves of that group and give them other arguments, but names neither another function of this
package nor code of its own. Arguments are plain values of the types that the leaf asks for.
"""

from __future__ import annotations

import importlib
import inspect
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import OmegaConf

from qvgen.config.bits import Bits
from qvgen.config.plain_json import whole
from qvgen.config.schema import TrainConfig
from qvgen.config.verb_schema import PrecomputeConfig
from qvgen.errors import UserError, did_you_mean, one_line

_PACKAGE_DIRECTORY = Path(__file__).resolve().parents[1]
MAX_FOREIGN_SIZE = 2**16
"""Largest size or count that is taken from a file: pixels, frames, steps, layers."""


def conf_directory() -> Path:
    """The configuration tree: inside the package where it was installed from a wheel, beside it in a checkout."""
    inside = _PACKAGE_DIRECTORY / "conf"
    return inside if inside.is_dir() else _PACKAGE_DIRECTORY.parent / "conf"


def build_leaf(spec: Mapping[str, Any], *, key: str) -> Any:
    """Build the object that a section with a `_target_` describes.

    Args:
        spec: ``{"_target_": "qvgen.methods.lsq.LSQ", argument: value, ...}``; plain values only.
        key: The section's name, for messages.

    Raises:
        UserError: No `_target_` or one that is no leaf of this group, also anywhere below; an unknown or missing argument, or
            one of another type.
        ValueError: Whatever the class itself refuses.
    """
    arguments = dict(spec)
    target = _find(arguments.pop("_target_", None), key=key)
    known, hints = inspect.signature(target).parameters, _hints(target)
    for name, value in arguments.items():
        if name not in known:
            raise UserError(f"unknown key '{key}.{name}'{did_you_mean(name, [f'{key}.{other}' for other in known])}")
        if _names_target(value):
            raise UserError(f"{key}.{name} holds a _target_; only {key} itself has one")
        check_type(value, hints.get(name, Any), key=f"{key}.{name}")
    for name, parameter in known.items():
        if parameter.default is inspect.Parameter.empty and name not in arguments:
            raise UserError(f"{key}.{name} is missing; write {key}.{name}=...")
    return target(**arguments)


def load_leaf(group: str, name: str, /, **changes: Any) -> Any:
    """Build the object of ``conf/GROUP/NAME.yaml``, for example ``("model", "tiny")``.

    Args:
        group: Folder of conf/.
        name: File of that folder; it alone decides which class is built.
        **changes: Arguments in place of the file's values.

    Raises:
        UserError: There is no such file, or the class has no such argument.
    """
    spec = _read_leaf(group, name)
    if "_target_" in changes:
        raise UserError(f"{group}={name}: _target_={changes['_target_']} is not an argument; the name decides")
    return build_leaf(_without_recipe({**spec, **changes}), key=group)


def load_profile(name: str, bits: Bits) -> Any:
    """Build the grids of ``conf/profile/NAME.yaml`` with these bits; raises UserError where there is no such file."""
    spec = _read_leaf("profile", name, resolve=False)  # its bits are the run's, which there is none of here
    return build_leaf({**spec, "weight_bits": bits.weight, "activation_bits": bits.activation}, key="profile")


def _read_leaf(group: str, name: str, *, resolve: bool = True) -> dict[str, Any]:
    """The section of ``conf/GROUP/NAME.yaml``; raises UserError where there is none."""
    folder = conf_directory() / group
    names = sorted(path.stem for path in folder.glob("*.yaml"))
    if name not in names:
        raise UserError(f"unknown {group}={name}{did_you_mean(name, names)} (there are: {', '.join(names)})")
    spec = OmegaConf.to_container(OmegaConf.load(folder / f"{name}.yaml"), resolve=resolve)
    assert isinstance(spec, dict), f"conf/{group}/{name}.yaml is no mapping"
    return {str(key): value for key, value in spec.items()}


Config = TypeVar("Config", bound=TrainConfig | PrecomputeConfig)


def build_leaves(config: Config) -> Config:
    """Replace the plain leaf sections of a configuration by the objects that they describe.

    Raises:
        ValueError: See :func:`build_leaf`.
    """
    groups = [group for group in ("model", "profile", "method", "init", "data") if hasattr(config, group)]
    return replace(
        config, **{group: build_leaf(_without_recipe(getattr(config, group)), key=group) for group in groups}
    )


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
        hints = _hints(_find(_read_leaf(group, name).get("_target_"), key=group))
        for key, value in arguments.items():
            if hints.get(key) is int:
                whole(value, f"{group}.{key}", low=1, high=MAX_FOREIGN_SIZE)
        return load_leaf(group, name, **arguments)
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
        raise UserError(f"{source}: {group}={name} can't be built as it says: {one_line(error)}") from error


@cache
def group_targets(group: str) -> tuple[str, ...]:
    """The leaves of a group, as the files of ``conf/GROUP`` name them; empty for a group without any."""
    named = []
    for path in sorted((conf_directory() / group).glob("*.yaml")):
        spec = yaml.safe_load(path.read_text(encoding="utf-8"))
        named += [spec["_target_"]] if isinstance(spec, dict) and "_target_" in spec else []
    return tuple(dict.fromkeys(named))


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


def _hints(target: Any) -> dict[str, Any]:
    """Types of a leaf's arguments; of a dataclass those of its fields, each from the module that declares it."""
    return typing.get_type_hints(target if is_dataclass(target) or not inspect.isclass(target) else target.__init__)


def _names_target(value: Any) -> bool:
    if isinstance(value, Mapping):
        return "_target_" in value or any(map(_names_target, value.values()))
    return isinstance(value, list | tuple) and any(map(_names_target, value))


def _find(name: object, *, key: str) -> Any:
    if not isinstance(name, str):
        raise UserError(f"{key} has no _target_; choose one of the files in conf/{key}")
    leaves = group_targets(key)
    if name not in leaves:
        raise UserError(
            f"{key}._target_={name} is no {key} of qvgen{did_you_mean(name, leaves)} (there are: {', '.join(leaves)})"
        )
    module_name, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module_name), attribute)
