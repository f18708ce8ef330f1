"""Checksums of the sources that run: a changed file is other code, wherever its folder lies."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from qvgen.config.leaf_file import foreign_targets
from qvgen.config.leaves import LEAF_GROUPS
from qvgen.errors import OWN_PACKAGES

_SOURCES = (".py", ".c", ".cpp", ".cu", ".cuh", ".h")


_BY_VERSION = ("lightning",)
"""Libraries whose version says what their classes do."""


def foreign_sources(plain: Mapping[str, Any], *, groups: Iterable[str] = LEAF_GROUPS) -> dict[str, str]:
    """The packages or files outside of qvgen that the leaves of a configuration come from -> the checksum of their sources.

    Args:
        plain: A configuration whose leaves were built, so that their modules are imported; or some of its sections.
        groups: Sections that are looked at.
    """
    sections = {group: plain[group] for group in groups if group in plain}
    packages = {target.partition(".")[0] for target in foreign_targets(sections)}
    return {name: _checksum(name) for name in sorted(packages.difference(_BY_VERSION))}


def sources_of(leaf: object) -> dict[str, str]:
    """Checksum of the package that brought one leaf, by the package's name; empty for a leaf of ours."""
    name = type(leaf).__module__.partition(".")[0]
    return {} if name in OWN_PACKAGES else {name: _checksum(name)}


def _checksum(name: str) -> str:
    """The checksum of a top-level package or module that is imported."""
    return _module_checksum(sys.modules[name])


@cache
def _module_checksum(module: ModuleType) -> str:
    """The checksum of a module: taken once, since a process does not load again what is edited meanwhile."""
    if not hasattr(module, "__path__"):
        return hashlib.sha256(Path(str(module.__file__)).read_bytes()).hexdigest()
    return sources_checksum(
        {f"{module.__name__}/{index}": Path(folder) for index, folder in enumerate(module.__path__)}
    )


def sources_checksum(packages: Mapping[str, Path]) -> str:
    """SHA-256 over all sources of packages, wherever their folders lie; 64 hex digits.

    Args:
        packages: Name -> folder.
    """
    digest = hashlib.sha256()
    for package, folder in packages.items():
        for file in sorted(path for path in folder.rglob("*") if path.suffix in _SOURCES):
            content = file.read_bytes()
            digest.update(f"{package}/{file.relative_to(folder).as_posix()} {len(content)}\n".encode())
            digest.update(content)
    return digest.hexdigest()
