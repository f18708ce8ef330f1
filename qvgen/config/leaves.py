"""Leaves: the objects that a `_target_` of conf/ names, and the folder conf/ itself.

Only names inside the package qvgen are followed, and only to what is defined there: a file that came with a model or
a run can choose among our classes, but never bring code of its own.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import OmegaConf

from qvgen.config.errors import UserError, did_you_mean
from qvgen.config.schema import TrainConfig
from qvgen.config.verb_schema import PrecomputeConfig

_PACKAGE_DIRECTORY = Path(__file__).resolve().parents[1]


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
        UserError: No `_target_`, one outside of qvgen, an unknown or missing argument.
        ValueError: Whatever the class itself refuses.
    """
    arguments = dict(spec)
    target = _find(arguments.pop("_target_", None), key=key)
    known = inspect.signature(target).parameters
    for name in arguments:
        if name not in known:
            raise UserError(f"unknown key '{key}.{name}'{did_you_mean(name, [f'{key}.{other}' for other in known])}")
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
    folder = conf_directory() / group
    names = sorted(path.stem for path in folder.glob("*.yaml"))
    if name not in names:
        raise UserError(f"unknown {group}={name}{did_you_mean(name, names)} (there are: {', '.join(names)})")
    spec = OmegaConf.to_container(OmegaConf.load(folder / f"{name}.yaml"), resolve=True)
    assert isinstance(spec, dict), f"conf/{group}/{name}.yaml is no mapping"
    if "_target_" in changes:
        raise UserError(f"{group}={name}: _target_={changes['_target_']} is not an argument; the name decides")
    return build_leaf(_without_recipe({**{str(key): value for key, value in spec.items()}, **changes}), key=group)


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


def _find(name: object, *, key: str) -> Any:
    if not isinstance(name, str):
        raise UserError(f"{key} has no _target_; choose one of the files in conf/{key}")
    module_name, _, attribute = name.rpartition(".")
    if not module_name.startswith("qvgen."):
        raise UserError(f"{key}._target_={name} is outside of qvgen; only qvgen's own classes can be named")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # a module that this one needs
        raise UserError(f"{key}._target_={name} does not exist; choose one of the files in conf/{key}") from error
    found = getattr(module, attribute, None)
    if not callable(found) or not str(getattr(found, "__module__", "")).startswith("qvgen."):
        raise UserError(f"{key}._target_={name} is no class or function of qvgen; choose a file in conf/{key}")
    return found
