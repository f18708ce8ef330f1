"""Files and folders that are half made: deleted where the process is ended while they are (:mod:`qvgen.stop_request`)."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_paths: set[Path] = set()


@contextmanager
def unfinished(path: Path) -> Iterator[None]:
    """Make a file or folder in the block that is nothing yet; whoever makes it deletes it after an exception."""
    _paths.add(path)
    try:
        yield
    finally:
        _paths.discard(path)


def delete_unfinished() -> None:
    """Delete all of them, from any thread; what can't be deleted is left."""
    for path in list(_paths):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
