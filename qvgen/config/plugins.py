"""Installed packages that bring leaves: the entry point group ``qvgen.plugins``. No code of a package is run to find them.

    [project.entry-points."qvgen.plugins"]      in the package's pyproject.toml
    mymethod = "qvgen_mymethod"                 the package in which the folder conf/ lies

    qvgen_mymethod/conf/init/mymethod.yaml      _target_: qvgen_mymethod.mymethod.MyMethod
    qvgen_mymethod/mymethod.py

The files of its conf/ are options as ours are: ``init=mymethod``. Each names a class of the package itself, or one of qvgen.
What is wrong with a package is said once by a warning that names it; a command that uses nothing of it works all the same,
one that chooses a file which can't be used is refused with the reason.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from pathlib import Path

import yaml

from qvgen.config.conf_folder import conf_directory
from qvgen.errors import one_line

log = logging.getLogger(__name__)

ENTRY_POINTS = "qvgen.plugins"


@dataclass(frozen=True, kw_only=True)
class Plugin:
    """A package that brings leaves.

    Attributes:
        name: Name of the distribution that is installed, as ``pip uninstall`` takes it.
        package: The top-level package whose classes its files may name.
        directory: Its conf/.
        targets: ``(group, name)`` of each file that can be used -> the class that it names; None where it names none.
    """

    name: str
    package: str
    directory: Path
    targets: dict[tuple[str, str], str | None] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Plugins:
    """All installed plug-ins.

    Attributes:
        usable: Plug-ins whose conf/ was found, by name.
        refused: ``(group, name)`` of each file that can't be used -> why, and what to do.
        problems: All that is wrong with plug-ins, one line each.
    """

    usable: tuple[Plugin, ...]
    refused: Mapping[tuple[str, str], str]
    problems: tuple[str, ...]


@cache
def find_plugins() -> Plugins:
    """The plug-ins of this environment; looked for once in a process, which also warns of their problems once."""
    usable, problems = [], []
    found = {(point.name, point.value): point for point in entry_points(group=ENTRY_POINTS)}
    for _, point in sorted(found.items()):
        name = point.dist.name if point.dist is not None else point.name
        try:
            usable.append(_read_plugin(point, name=name))
        except Exception as error:  # a dotted name runs the code of a parent package, which may raise anything
            problems.append(f"plug-in {name}: {one_line(error)}; repair or uninstall it")
    refused, shadowed = _read_files(usable)
    problems += [*dict.fromkeys(refused.values()), *shadowed]
    result = Plugins(usable=tuple(usable), refused=refused, problems=tuple(problems))
    for problem in result.problems:
        log.warning("%s", problem)
    return result


def _read_plugin(point: EntryPoint, *, name: str) -> Plugin:
    if point.attr:
        raise ValueError(f"its entry point {point.name} = {point.value!r} names an object and not a package")
    spec = find_spec(point.module)
    if spec is None:
        raise ValueError(f"its entry point {point.name} names the package {point.module!r}, which is not there")
    places = spec.submodule_search_locations or [str(Path(str(spec.origin)).parent)]
    directory = next((Path(place) / "conf" for place in places if (Path(place) / "conf").is_dir()), None)
    if directory is None:
        raise ValueError(f"the package {point.module} has no folder conf with files such as init/mine.yaml")
    return Plugin(name=name, package=point.module.partition(".")[0], directory=directory)


def _read_files(plugins: list[Plugin]) -> tuple[dict[tuple[str, str], str], list[str]]:
    """Fill in the targets of all plug-ins; why some of their files can't be used, and which are hidden by ours."""
    ours, refused, shadowed = set(_files(conf_directory())), {}, []
    brought: defaultdict[tuple[str, str], list[Plugin]] = defaultdict(list)
    for plugin in plugins:
        for key, path in _files(plugin.directory).items():
            brought[key].append(plugin)
            plugin.targets[key] = None
            if key not in ours and (problem := _read_target(plugin, key, path)):
                refused[key] = f"plug-in {plugin.name}: {'='.join(key)} can't be used: {problem}"
    for key, owners in brought.items():
        names = " and ".join(plugin.name for plugin in owners)
        if key in ours:
            file = "/".join(filter(None, key))
            shadowed.append(
                f"plug-in {names}: its conf/{file}.yaml has the name of a file of qvgen, which counts; rename it"
            )
        elif len(owners) > 1 and key[0]:
            refused[key] = f"{'='.join(key)} is brought by the plug-ins {names}; uninstall one of them"
        if key in ours or key in refused:
            for plugin in owners:
                del plugin.targets[key]
    return refused, shadowed


def _files(directory: Path) -> dict[tuple[str, str], Path]:
    """(group, name) -> file of a configuration tree; the group of the files of verbs is empty."""
    groups = {path: path.parent.name for path in directory.glob("*/*.yaml")} | dict.fromkeys(
        directory.glob("*.yaml"), ""
    )
    return {(group, path.stem): path for path, group in sorted(groups.items())}


def _read_target(plugin: Plugin, key: tuple[str, str], path: Path) -> str:
    """Note the class that a file names; what is wrong with the file, or nothing."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        return f"{path} is no YAML file ({one_line(error)}); repair or uninstall {plugin.name}"
    target = content.get("_target_") if isinstance(content, dict) else None
    if target is None:
        return ""
    if str(target).partition(".")[0] not in (plugin.package, "qvgen"):
        return f"{path} names {target}, which is outside of its package {plugin.package}; repair or uninstall {plugin.name}"
    plugin.targets[key] = str(target)
    return ""


def plugin_targets(group: str) -> Iterator[str]:
    """The classes that the plug-ins' files of a group name."""
    for plugin in find_plugins().usable:
        yield from (target for (of, _), target in plugin.targets.items() if of == group and target is not None)
