"""What compilers make for tests, kept in pytest's cache: compiling takes longer than running what was compiled."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import pytest


def kept_build(
    config: pytest.Config, name: str, *, command: Sequence[str], inputs: Iterable[Path], make: Callable[[Path], object]
) -> Path:
    """The folder that ``make`` filled, now or by an earlier run of the tests of the same checkout.

    Args:
        config: Of pytest.
        name: Of the build; of each name only the newest is kept.
        command: The compiler and its flags.
        inputs: All files that the compiler reads, but for the system's.
        make: Compiles into the folder that it is given.
    """
    version = subprocess.run([command[0], "--version"], capture_output=True, check=True).stdout
    digest = hashlib.sha256(b"\0".join([version, *map(str.encode, command)]))
    for path in sorted(inputs):
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    cache = getattr(config, "cache", None)
    root = Path(tempfile.mkdtemp()) if cache is None else cache.mkdir(f"qvgen_{name}")
    folder = root / digest.hexdigest()[:32]
    if folder.is_dir():
        return folder
    made = Path(tempfile.mkdtemp(prefix="unfinished-", dir=root))  # of its own: tests may run twice at the same time
    try:
        make(made)
        for older in root.iterdir():
            if older != folder and not older.name.startswith("unfinished-"):
                shutil.rmtree(older, ignore_errors=True)
        if not folder.is_dir():
            made.rename(folder)
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return folder
