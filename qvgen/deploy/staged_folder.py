"""A folder that is written in one piece: what a killed process leaves never looks like the whole.

    out is not there     out's files are made in .OUT.unfinished beside it, which is then renamed
    out is there         in out/.OUT.unfinished, whose files are moved into out, the one that says "whole" last

A process that is killed leaves the folder .OUT.unfinished; the next one that writes there deletes it and says so.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qvgen import stop_request
from qvgen.run_directory import LOCK_FILE, take_lock
from qvgen.unfinished import unfinished

log = logging.getLogger(__name__)

SCRATCH = ".scratch"
"""Folder in the unfinished one for what is no part of the result."""


@contextmanager
def staged(out: Path, *, last: str, replaced: tuple[str, ...] = ()) -> Iterator[Path]:
    """A folder to write to; at the end of the block its files are those of ``out``, after an exception nothing is left.

    Args:
        out: Where the files go; other files that are there stay.
        last: The file that says that the folder is whole: the first to go and the last to come.
        replaced: Files below ``out`` that the new ones stand for; they are deleted.

    Raises:
        UserError: Another process writes there.
    """
    folder = (out if out.is_dir() else out.parent) / f".{out.name}.unfinished"
    folder.parent.mkdir(parents=True, exist_ok=True)
    is_left = folder.exists()
    folder.mkdir(exist_ok=True)
    lock = take_lock(folder, key="out", value=out)
    try:
        with unfinished(folder):
            if is_left:
                log.warning("%s was not finished by an earlier call; it is made again", out)
                _empty(folder)
            yield folder
            shutil.rmtree(folder / SCRATCH, ignore_errors=True)
            with stop_request.undivided():
                _put_in_place(folder, out, last=last, replaced=replaced)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _empty(folder: Path) -> None:
    """Delete all but the lock, which is held."""
    for entry in folder.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
        elif entry.name != LOCK_FILE:
            entry.unlink()


def _put_in_place(folder: Path, out: Path, *, last: str, replaced: tuple[str, ...]) -> None:
    stop_request.note(f"after {out} was written, which is whole")
    if not out.exists():
        (folder / LOCK_FILE).unlink()
        folder.rename(out)
        return
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    files = [name for name in files if name not in (LOCK_FILE, last)]
    for name in (last, *replaced, *files):
        (out / name).unlink(missing_ok=True)
    for name in (*files, last):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).replace(out / name)
