"""Who makes what in a cache that several processes fill: claims, which end with the process that holds them.

    cache/.claims    an empty file; a claim is a record lock on the byte whose number the key gives

The kernel lifts a lock when its process ends, however it ends, on a local disk and on a network's: what a killed process had
claimed is free at once, and there is nothing to clean up. Claims are for other processes; one process can take a key twice,
and gives all its claims back where it closes the file: it may have one :class:`Claims` of a folder at a time.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from qvgen import work_item
from qvgen.errors import UserError

CLAIMS_FILE = ".claims"
_LOCK = "hhqqi"
"""``struct flock`` of 64-bit Linux: kind, origin, first byte, bytes, process."""
POLL_SECONDS = 0.1
_DIGITS = 15
"""Hexadecimal digits of a key that number its byte: 60 bits, within what a lock's offset can be. Two keys of one number only
wait for each other."""


class Claims:
    """The claims of this process in a cache; a context manager that gives all of them back.

    Args:
        folder: The cache's; it is made.
        key: Key of the configuration that names the cache, for messages.

    Raises:
        UserError: The disk knows no locks.
    """

    def __init__(self, folder: Path, *, key: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path, self._key = folder / CLAIMS_FILE, key
        self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)

    def take(self, key: str) -> bool:
        """Claim a key, a SHA-256 in hexadecimal digits; False where another process holds it."""
        try:
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, int(key[:_DIGITS], 16))
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return False
            raise UserError(
                f"{self._path} can't be locked ({error.strerror}): processes that fill one cache tell each other by locks "
                f"what they make; give {self._key}=FOLDER on a disk with locks (NFS with its lock service, Lustre mounted "
                "with flock)"
            ) from error
        return True

    def holder(self, key: str) -> int | None:
        """The process of this machine that holds a key; None: none does, or it is another machine's or can't be known."""
        if sys.platform != "linux":
            return None
        asked = struct.pack(_LOCK, fcntl.F_WRLCK, os.SEEK_SET, int(key[:_DIGITS], 16), 1, 0)
        try:
            kind, _, _, _, pid = struct.unpack(_LOCK, fcntl.fcntl(self._descriptor, fcntl.F_GETLK, asked))
        except OSError:
            return None
        return pid if kind != fcntl.F_UNLCK and pid > 0 and Path(f"/proc/{pid}").exists() else None

    @property
    def folder(self) -> Path:
        """The cache's folder."""
        return self._path.parent

    def give_back(self, key: str) -> None:
        """Let others claim a key again."""
        fcntl.lockf(self._descriptor, fcntl.LOCK_UN, 1, int(key[:_DIGITS], 16))

    @contextmanager
    def held(self, key: str) -> Iterator[bool]:
        """Hold a key while the block runs; wait for it where another process holds it.

        Yields:
            Whether another process held it.
        """
        waited = False
        while not self.take(key):
            waited = True
            work_item.wait()
            time.sleep(POLL_SECONDS)
        if waited:
            work_item.go_on()
        try:
            yield waited
        finally:
            self.give_back(key)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._descriptor)
