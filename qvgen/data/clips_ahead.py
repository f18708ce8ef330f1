"""Clips of a table read ahead of the encoders: hashed and cut while the VAE works on those before them.

    row --submit--> a thread with a ClipReader of its own: bytes -> sha256, worker process -> frames --Future--> encoders

Decoding is the CPU's work and encoding the GPU's, and one of the two waits where they take turns. Neither what is read nor
the order in which it is used depends on the number of readers.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from queue import SimpleQueue
from types import TracebackType
from typing import Self, TypeVar

from qvgen.data.captions import Clip
from qvgen.data.clip_process import TIMEOUT_S, ClipReader, TimedOut
from qvgen.data.clips import BadClip, ClipCut, CutSettings
from qvgen.data.video import Frames


@dataclass(frozen=True, eq=False)
class ReadClip:
    """The frames of a clip, read from its bytes.

    Attributes:
        sha256: Checksum of the bytes.
        cut: Which frames and which part of them.
        frames: uint8 [F, H, W, 3].
    """

    sha256: str
    cut: ClipCut
    frames: Frames


@dataclass(frozen=True)
class Unreadable:
    """Why a clip can't be used.

    Attributes:
        reason: In words, without its path.
        again: Whether another try may succeed: the reason lies outside of the file.
    """

    reason: str
    again: bool


Reading = Future[ReadClip | Unreadable]
Known = TypeVar("Known")


class ClipsAhead:
    """Reads clips in worker processes, several at a time; a context manager that ends them.

    Args:
        settings: How clips are cut.
        readers: Worker processes; each holds the frames of one clip.
        timeout_s: Seconds that one file may take.

    Raises:
        ValueError: ``readers`` is less than 1.
    """

    def __init__(self, settings: CutSettings, *, readers: int = 1, timeout_s: float = TIMEOUT_S) -> None:
        if readers < 1:
            raise ValueError(f"readers={readers} must be 1 or more")
        self._settings = settings
        self._readers = [ClipReader(timeout_s=timeout_s) for _ in range(readers)]
        self._idle: SimpleQueue[ClipReader] = SimpleQueue()
        for reader in self._readers:
            self._idle.put(reader)
        self._pool = ThreadPoolExecutor(readers, thread_name_prefix="clips")

    def in_order(self, rows: Iterable[tuple[Clip, Known | None]]) -> Iterator[tuple[Clip, Known | Reading]]:
        """Rows in their order, while the clips of the next ones are read, one for each reader.

        Args:
            rows: Clips, each with what is known of it where it need not be read, and None where it must.

        Yields:
            A clip with what is known of it, or with a future that raises what is no fault of the clip's.
        """
        waiting: deque[tuple[Clip, Known | Reading]] = deque()
        reading = 0
        for clip, known in rows:
            waiting.append((clip, self._pool.submit(self._read, clip) if known is None else known))
            reading += known is None
            while waiting and (reading > len(self._readers) or not isinstance(waiting[0][1], Future)):
                entry = waiting.popleft()
                reading -= isinstance(entry[1], Future)
                yield entry
        yield from waiting

    def _read(self, clip: Clip) -> ReadClip | Unreadable:
        reader = self._idle.get()
        path = clip.path  # or a temporary one
        try:
            if not clip.caption:
                raise BadClip("it has no caption")
            with clip.local_file() as path:
                if not path.is_file():
                    raise BadClip("there is no such file")
                with path.open("rb") as file:
                    sha256 = hashlib.file_digest(file, "sha256").hexdigest()
                return ReadClip(sha256, *reader.cut(path, settings=self._settings))
        except (BadClip, PermissionError) as error:
            reason = str(error) if path is None else str(error).replace(str(path), "the file")
            return Unreadable(reason, again=isinstance(error, TimedOut | PermissionError))
        finally:
            self._idle.put(reader)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
        for reader in self._readers:
            reader.end()
        self._pool.shutdown()
        for reader in self._readers:
            reader.close()
