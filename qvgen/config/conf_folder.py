"""Folders of configuration files: conf/ of this package, and the one that a command brings by ``--config-dir``.

A command's own folder counts for as long as the command runs, as its overrides do. It is searched first, so that a file in it
stands in place of a file of ours of the same name.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from qvgen.errors import UserError

_PACKAGE_DIRECTORY = Path(__file__).resolve().parents[1]

_user_directory: Path | None = None
"""The folder that the present command names; a process works on one command at a time."""


class FileState(NamedTuple):
    """A file at a time: what was read from it counts for as long as this stays the same.

    Attributes:
        path: The file.
        changed_ns: When it was written.
        nbytes: Its size.
    """

    path: Path
    changed_ns: int
    nbytes: int

    @classmethod
    def of(cls, path: Path) -> FileState:
        """The present state."""
        found = path.stat()
        return cls(path, found.st_mtime_ns, found.st_size)


def conf_directory() -> Path:
    """The configuration tree: inside the package where it was installed from a wheel, beside it in a checkout."""
    inside = _PACKAGE_DIRECTORY / "conf"
    return inside if inside.is_dir() else _PACKAGE_DIRECTORY.parent / "conf"


def user_directory() -> Path | None:
    """The folder of the present command's ``--config-dir``; None where it has none."""
    return _user_directory


@contextmanager
def using_directory(directory: Path | None) -> Iterator[None]:
    """Search a further folder first while the block of a ``with`` statement runs; None changes nothing.

    Raises:
        UserError: It is no folder.
    """
    global _user_directory
    if directory is not None and not directory.is_dir():
        raise UserError(f"--config-dir {directory} is no folder; give one with files such as experiment/mine.yaml")
    before = _user_directory
    _user_directory = before if directory is None else directory.resolve()
    try:
        yield
    finally:
        _user_directory = before
