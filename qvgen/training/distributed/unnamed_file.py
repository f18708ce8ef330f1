"""A file that has no name until it is given one (Linux's O_TMPFILE): what writes to it need not know when that is."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import BinaryIO


def unnamed_files(folder: Path, number: int) -> list[BinaryIO]:
    """New files on the disk of a folder that need not be there yet, open for writing.

    There are none where the disk has no such files, or nothing could give them a name later (:func:`name_file`).
    """
    if not Path("/proc/self/fd").is_dir():
        return []
    flag, place = getattr(os, "O_TMPFILE", None), next(part for part in folder.absolute().parents if part.is_dir())
    found: list[BinaryIO] = []
    try:
        for _ in range(0 if flag is None else number):
            found.append(os.fdopen(os.open(place, flag | os.O_WRONLY, 0o666), "wb"))
    except OSError:  # not every filesystem has them
        while found:
            found.pop().close()
    return found


def name_file(file: BinaryIO, path: Path) -> None:
    """Give a file of :func:`unnamed_files` its name, in place of what has it now; whoever has it open writes on.

    Raises:
        OSError: The path lies on another disk, or can't be written.
    """
    # A link replaces nothing, and a rename does.
    with tempfile.TemporaryDirectory(prefix=".", dir=path.parent) as folder:
        linked, descriptor = Path(folder) / path.name, os.open(folder, os.O_RDONLY)
        try:  # Python follows what stands in /proc to the file only where it is given a folder's descriptor
            os.link(f"/proc/self/fd/{file.fileno()}", linked, src_dir_fd=descriptor, follow_symlinks=True)
        finally:
            os.close(descriptor)
        linked.replace(path)
