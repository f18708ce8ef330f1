"""Files of leaves, ``GROUP/NAME.yaml``: in conf/, in the conf/ of plug-ins, and in the folder that a command brings.

A file that a command brings stands before one of ours of the same name, and ours before a plug-in's, as hydra searches them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from copy import deepcopy
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from qvgen.config.conf_folder import FileState, conf_directory, user_directory
from qvgen.config.plugins import find_plugins, plugin_targets
from qvgen.errors import OWN_PACKAGES, UserError, did_you_mean, one_line

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""The same values ten times as fast, where PyYAML has libyaml: all files of a group are read to know their classes."""


def leaf_names(group: str) -> list[str]:
    """Names of all files of a group that can be chosen: ours, those of plug-ins, and the command's own."""
    folder = user_directory()
    mine = [] if folder is None else [path.stem for path in (folder / group).glob("*.yaml")]
    return sorted({*mine, *installed_names(group)})


def installed_names(group: str) -> list[str]:
    """Names of the files of a group that every command can choose: ours and those of plug-ins."""
    brought = [name for plugin in find_plugins().usable for of, name in plugin.targets if of == group]
    return sorted({*brought, *(path.stem for path in (conf_directory() / group).glob("*.yaml"))})


def leaf_path(group: str, name: str) -> Path:
    """The file that ``GROUP=NAME`` chooses.

    Raises:
        UserError: There is none, or it is a plug-in's that can't be used.
    """
    if (group, name) in find_plugins().refused and not _is_users(group, name):
        raise UserError(find_plugins().refused[group, name])
    names = leaf_names(group)
    if name not in names:
        raise UserError(f"unknown {group}={name}{did_you_mean(name, names)} (there are: {', '.join(names)})")
    folders = [conf_directory(), *(plugin.directory for plugin in find_plugins().usable)]
    if _is_users(group, name):
        folders = [user_directory() or conf_directory()]
    return next(path for folder in folders if (path := folder / group / f"{name}.yaml").is_file())


def check_choice(group: str, name: str) -> None:
    """Raise UserError where ``GROUP=NAME`` chooses a plug-in's file that can't be used."""
    if (group, name) in find_plugins().refused:
        leaf_path(group, name)


def read_leaf(group: str, name: str, *, resolve: bool = True) -> dict[str, Any]:
    """The section of the file that ``GROUP=NAME`` chooses; see :func:`leaf_path`."""
    spec = OmegaConf.to_container(OmegaConf.create(leaf_content(group, name)), resolve=resolve)
    assert isinstance(spec, dict), "made of a mapping"
    return {str(key): value for key, value in spec.items()}


def leaf_target(group: str, name: str) -> str | None:
    """The class that ``GROUP=NAME`` names; None where its file names none."""
    target = leaf_content(group, name).get("_target_")
    return None if target is None else str(target)


def leaf_content(group: str, name: str) -> dict[str, Any]:
    """A file as it is, over the files of its group that its defaults list names, as hydra composes them."""
    path = leaf_path(group, name)
    content = _file_content(FileState.of(path))
    own = {str(key): deepcopy(value) for key, value in content.items() if key != "defaults"}
    names = content.get("defaults", [])
    if not all(isinstance(entry, str) and entry != name for entry in names):
        raise UserError(f"{path}: its defaults are {names}; name other files of conf/{group}, and _self_")
    if not names:
        return own
    parts = [own if entry == "_self_" else leaf_content(group, entry) for entry in names]
    merged = OmegaConf.to_container(OmegaConf.merge(*parts, *([] if "_self_" in names else [own])))
    assert isinstance(merged, dict), "made of mappings"
    return {str(key): value for key, value in merged.items()}


@lru_cache(maxsize=256)
def _file_content(file: FileState) -> dict[Any, Any]:
    """The content of a file, read once for as long as it stays: a command asks for its model's several times."""
    content = OmegaConf.to_container(OmegaConf.load(file.path))
    if not isinstance(content, dict):
        raise UserError(f"{file.path} is no mapping; write _target_: and the arguments of the class")
    return content


def users_targets(group: str, name: str) -> frozenset[str]:
    """The class that ``GROUP=NAME`` names where the file is the user's own, which they gave with this command."""
    return frozenset(filter(None, [leaf_target(group, name)])) if _is_users(group, name) else frozenset()


def _is_users(group: str, name: str) -> bool:
    folder = user_directory()
    return folder is not None and name in {path.stem for path in (folder / group).glob("*.yaml")}


@cache
def _own_targets(group: str) -> tuple[str, ...]:
    named = []
    for path in sorted((conf_directory() / group).glob("*.yaml")):
        spec = yaml.load(path.read_text(encoding="utf-8"), Loader=_LOADER)
        named += [spec["_target_"]] if isinstance(spec, dict) and "_target_" in spec else []
    return tuple(dict.fromkeys(named))


def group_targets(group: str) -> tuple[str, ...]:
    """The leaves of a group, as the files of ``conf/GROUP`` and of plug-ins name them; empty for a group without any."""
    return tuple(dict.fromkeys([*_own_targets(group), *plugin_targets(group)]))


def targets_below(plain: Mapping[str, Any]) -> frozenset[str]:
    """The classes that the sections of a configuration name, and its kernel where that is one."""
    sections = [section for section in plain.values() if isinstance(section, Mapping)]
    named = [plain[group] for group in ("callbacks", "logger") if isinstance(plain.get(group), Mapping)]
    sections += [entry for section in named for entry in section.values() if isinstance(entry, Mapping)]
    targets = {str(section["_target_"]) for section in sections if isinstance(section.get("_target_"), str)}
    kernel = plain.get("kernel")
    return frozenset(targets | ({kernel} if isinstance(kernel, str) and "." in kernel else set()))


def foreign_targets(plain: Mapping[str, Any]) -> frozenset[str]:
    """The classes outside of qvgen that the sections of a configuration name: a plug-in's and the user's own."""
    return frozenset(target for target in targets_below(plain) if target.partition(".")[0] not in OWN_PACKAGES)


def targets_of_folder() -> frozenset[str]:
    """The classes that the files of the present command's ``--config-dir`` name, in any group or section.

    Raises:
        UserError: One of its files is no YAML.
    """
    folder = user_directory()
    return frozenset() if folder is None else frozenset(_targets_of_files(folder))


def _targets_of_files(folder: Path) -> Iterator[str]:
    for path in sorted(folder.rglob("*.yaml")):
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise UserError(f"{path} is no YAML file: {one_line(error)}") from error
        if isinstance(content, Mapping):
            yield from targets_below({**content, path.parent.name: content})
