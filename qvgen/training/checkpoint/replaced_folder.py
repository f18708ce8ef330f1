"""Putting a file or folder in its place in one piece, also where one of the other kind stands there."""

from __future__ import annotations

import ctypes
import os
import shutil
from pathlib import Path

from qvgen.run_directory import force_to_disk

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def put_in_place(new: Path, path: Path) -> None:
    """Rename a folder or file whose content is on the disk; what stands at the path is replaced, whichever it is.

    Linux exchanges both in one go, so that a kill leaves the old one or the new one. A file system that can't (some that
    are reached over a network) gets two renames, and a kill between them leaves the old one beside its place.

    Args:
        new: It; if this process is killed, another one deletes what has its name.
        path: Its place, in the same folder.
    """
    force_to_disk(new)
    if not path.exists():
        new.replace(path)
    elif _exchange(new, path):
        remove(new)
    else:
        old = new.with_name(f"{new.name.removesuffix('.tmp')}.old.tmp")
        path.replace(old)
        new.replace(path)
        remove(old)
    force_to_disk(path.parent)


def remove(path: Path) -> None:
    """Delete a checkpoint, a file or a folder.

    A folder is no checkpoint any more from the first moment on: it is renamed before its files go.
    """
    if not path.is_dir():
        path.unlink(missing_ok=True)
        return
    gone = path if path.name.endswith(".tmp") else path.with_name(f".{path.name}.old.tmp")
    if gone != path:
        shutil.rmtree(gone, ignore_errors=True)
        path.replace(gone)
    shutil.rmtree(gone, ignore_errors=True)  # what is left of it goes with the next save


def _exchange(left: Path, right: Path) -> bool:
    """Whether both names were exchanged."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:
        return False
    names = [os.fsencode(path) for path in (left, right)]
    return bool(rename(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0)
