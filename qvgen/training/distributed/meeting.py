"""Where the processes that another launcher started meet: a store of torch.distributed, beside the group that trains.

    rank 0    claims the run's folder, makes the start, announces both -- trains -- folds, reports, says how it ended
    others    wait (seconds or hours); help with the start where rank 0 asks -- take part --- end, with rank 0's exit code

A thread of each process looks at the store several times a second. It passes on a request to stop, which may reach any
process alone, and it ends a process that waits in a collective for one that failed: the launcher does that too where it is
torchrun, srun only with ``--kill-on-bad-exit``. Waiting has no time limit: preparing a large model takes hours. Who is gone,
can't be reached or hangs is told by connections beside the store (:mod:`qvgen.training.distributed.peer_links`).
"""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import distributed
from torch.distributed import PrefixStore

from qvgen import stop_request
from qvgen.config.processes.launched_world import LaunchedWorld
from qvgen.errors import UnfitEnvironmentError
from qvgen.run_directory import atomic_write
from qvgen.training.distributed import heartbeat
from qvgen.training.distributed.cluster import group_backend
from qvgen.training.distributed.launched_store import check_shared, open_store, process_name, wait_for_server
from qvgen.training.distributed.network_errors import gone_words, is_of_network
from qvgen.training.distributed.peer_links import Links, LinksToOthers, LinkToRankZero
from qvgen.training.distributed.silence import BAD_ENVIRONMENT
from qvgen.training.distributed.start_watch import StartWatch
from qvgen.training.distributed.store_watch import END, FAILED, STOP, StoreWatch

log = logging.getLogger(__name__)

POLL_SECONDS = 0.2
WORDS_SECONDS = 5.0
"""How long a process whose collective failed waits for what another one says of its end."""
FAREWELL_SECONDS = 5.0
"""How long rank 0, where it serves the store, stays for the others to read how it ended."""
MARK_FILE = "launch.txt"
"""In the folder of logs; what stands there tells this start from others."""
SAMPLE, START, RUN = "sample", "start", "run"
"""What rank 0 asks the others for: to sample for the start, to set up layers for it, to train."""
_READ, _LINK = "read", "link"


class RankZeroEndedError(Exception):
    """Rank 0 has ended, and said so or not; this process has nothing left to do.

    Attributes:
        code: Its exit code.
    """

    def __init__(self, code: int, message: str = "") -> None:
        super().__init__(message)
        self.code = code


class Meeting:
    """The store that the processes of a world share, as one of them uses it; a context manager.

    Args:
        world: This process and the others.

    Attributes:
        world: The same.
        me: This process in words.

    Raises:
        RuntimeError: Rank 0 can't serve the store, or is not reached.
    """

    def __init__(self, world: LaunchedWorld) -> None:
        self.world = world
        self.me = process_name(world)
        self._serves = world.rank == 0 and not world.has_store
        if not self._serves:
            wait_for_server(world)
        self._store = open_store(world, serves=self._serves)
        self._watched = open_store(world)  # a connection of its own: what waits in the other one holds it
        self._mark = uuid.uuid4().hex
        self._ending = threading.Lock()
        self._links = self._open_links()
        self._watcher = StoreWatch(self._watched, world=world, end=self._end_now)

    def __enter__(self) -> Self:
        global _current
        _current = self
        self._watcher.start()
        self._links.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _current
        _current = None
        self._watcher.close()
        self._links.close()

    def _open_links(self) -> Links:
        if self.world.rank == 0:
            others = LinksToOthers(self.world.size, end=self._end_now)
            self._store.set(_LINK, others.told)
            return others
        return LinkToRankZero(self.world.rank, address=self.world.address, ask=self._link, end=self._end_now)

    def _link(self) -> str | None:
        with suppress(RuntimeError):  # the store is gone, which the other threads see
            return self._watched.get(_LINK).decode() if self._watched.check([_LINK]) else None
        return None

    # Rank 0

    def announce(self, run_dir: Path, *, asks: str = RUN, marked: Path | None = None) -> None:
        """As rank 0, when the run's folder holds all that the others need: let them begin.

        Args:
            run_dir: The run's folder, with ``logs/worker.yaml``.
            asks: For what: training, or help before that (``SAMPLE``, ``START``), behind which they wait again.
            marked: A further folder that gets what tells this start from others (:func:`launched_store.is_shared`).
        """
        said = {"folder": str(run_dir.absolute()), "mark": self._mark, "host": socket.gethostname()}
        for folder in (run_dir / "logs", *([] if marked is None else [marked])):
            folder.mkdir(parents=True, exist_ok=True)
            atomic_write(folder / MARK_FILE, self._mark.encode())
        self._store.set(asks, json.dumps(said))

    def start_watch(self) -> StartWatch:
        """As rank 0: who tells whether those that help with the start are still there."""
        assert isinstance(self._links, LinksToOthers), "rank 0 has them"
        return StartWatch(self._links, failure=self._failure)

    def end(self, code: int) -> None:
        """As rank 0: say how the command ended, and stay until the others have read it."""
        self._say_end(code)

    # The others

    def wait_for_run(self, *, helps: Mapping[str, Callable[[Path], None]]) -> Path:
        """As another rank: wait until rank 0 lets begin; the run's folder.

        Args:
            helps: What rank 0 may ask for before that -> what does it, once, with the same folder; in this order.

        Raises:
            RankZeroEndedError: It ended before.
            UnfitEnvironmentError: Its files are not seen here.
        """
        left = dict(helps)
        while not self._store_has(RUN):
            if (code := self.ended()) is not None:
                why = self._failure() or f"rank 0 ended with exit code {code} before training began"
                raise RankZeroEndedError(code, f"{self.me} ends: {why}")
            for asked in filter(self._store_has, tuple(left)):
                left.pop(asked)(self._seen_folder(asked))
            time.sleep(POLL_SECONDS)
        return self._seen_folder(RUN)

    def _seen_folder(self, key: str) -> Path:
        said = json.loads(self._store.get(key))
        folder = Path(said["folder"])
        check_shared(folder / "logs" / MARK_FILE, mark=said["mark"], me=self.me, host=said["host"])
        return folder

    def ended(self) -> int | None:
        """Rank 0's exit code, once it has said that it ends."""
        return int(self._store.get(END)) if self._store_has(END) else None

    def _store_has(self, key: str) -> bool:
        try:
            return bool(self._store.check([key]))
        except RuntimeError as error:
            address = f"{self.world.address}:{self.world.port}"
            raise RankZeroEndedError(
                BAD_ENVIRONMENT, f"{self.me} ends: rank 0 at {address} is gone; see its output"
            ) from error

    def verdict(self, *, timeout_s: float) -> int | None:
        """As another rank that can't go on: rank 0's exit code, if it ends within a time; None: it goes on."""
        deadline = time.monotonic() + timeout_s
        while (code := self.ended()) is None and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS / 2)
        return code

    def fail(self, message: str) -> None:
        """As another rank: tell all why this one ends; who says it first counts, others may have lost this one."""
        self._watcher.close()  # it would take this for another one's end
        with suppress(RuntimeError):  # rank 0 is gone
            self._store.compare_set(FAILED, "", message)

    def leave(self) -> None:
        """As another rank: say that rank 0 need not stay for this one."""
        try:
            self._store.add(_READ, 1)
        except RuntimeError:
            log.debug("the store is gone")

    # All

    @contextmanager
    def group(self, *, timeout: timedelta, hang_minutes: float | None, shares_on_host: bool) -> Iterator[None]:
        """The process group of torch while a block trains; what breaks in it is explained, and who is silent is said.

        Args:
            timeout: Of a collective.
            hang_minutes: This process is ended after so long in which no process reported anything; None: never.
            shares_on_host: See :func:`qvgen.training.distributed.cluster.group_backend`.

        Raises:
            UnfitEnvironmentError: Another process failed or is gone.
        """
        backend = group_backend(on_gpu=torch.cuda.is_available(), shares_on_host=shares_on_host)
        store = PrefixStore("group", open_store(self.world))
        store.set_timeout(timeout)
        ranks = {"rank": self.world.rank, "world_size": self.world.size}
        try:
            distributed.init_process_group(backend, store=store, timeout=timeout, **ranks)
            self._links.watch_silence(hang_minutes=hang_minutes, end=self._end_stopped)
            yield
        except stop_request.Stopped:
            self._adopt_stop()
            raise
        except RuntimeError as error:
            if isinstance(error, UnfitEnvironmentError) or not is_of_network(error):
                raise
            why = self._why_lost() or gone_words(error)
            raise UnfitEnvironmentError(f"{self.me} lost the others in step {heartbeat.last_step()}: {why}") from error
        finally:
            self._links.stop_watching_silence()
            if distributed.is_initialized():
                distributed.destroy_process_group()

    def _adopt_stop(self) -> None:
        """End with the exit code of the signal that another process was sent."""
        try:
            deadline = time.monotonic() + 2.0
            while not self._store.check([STOP]) and time.monotonic() < deadline:
                time.sleep(POLL_SECONDS / 4)
            if self._store.check([STOP]):
                stop_request.adopt(int(self._store.get(STOP)))
        except RuntimeError:
            log.debug("the store is gone")

    def _why_lost(self) -> str | None:
        """What another process said of its end, or which one is gone, as soon as one of both is known."""
        deadline = time.monotonic() + WORDS_SECONDS
        while not (why := self._failure() or self._links.lost) and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
        return why

    def _failure(self) -> str | None:
        with suppress(RuntimeError):
            return self._store.get(FAILED).decode() if self._store.check([FAILED]) else None
        return None

    def _end_now(self, why: str) -> None:
        self._ending.acquire()  # for good: one line is said, while the main thread waits in compiled code
        sys.stderr.write(f"qvgen: {self.me} ends in step {heartbeat.last_step()}: {why}\n")
        sys.stderr.flush()
        self._say_end(BAD_ENVIRONMENT)
        os._exit(BAD_ENVIRONMENT)

    def _end_stopped(self, code: int | None, why: str) -> None:
        self._say_end(stop_request.exit_code(stop_request.number() or 0) if code is None else code)
        stop_request.end_now(code, why=why)

    def _say_end(self, code: int) -> None:
        if self.world.rank:
            return
        with suppress(RuntimeError):  # the store is gone
            self._watched.set(END, str(code))
            deadline = time.monotonic() + FAREWELL_SECONDS
            while self._serves and self._watched.add(_READ, 0) < self.world.size - 1 and time.monotonic() < deadline:
                time.sleep(POLL_SECONDS / 4)


_current: Meeting | None = None


def current() -> Meeting | None:
    """Where this process meets those that another launcher started with it; None after a plain start."""
    return _current
