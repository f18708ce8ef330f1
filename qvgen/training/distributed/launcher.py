"""The processes of a distributed run on one machine: started, watched and ended by us.

Rank 0 is the process that the user started. The others run a command that the caller gives, in an environment that we make.
Neither Lightning's launcher nor variables of the environment take part: under --multirun Lightning's children would run the
whole sweep again, and a LOCAL_RANK that some other program left would turn two processes into one.

    user -> rank 0 --- WorkerGroup --- rank 1 `qvgen worker VERB CONFIG --rank 1 --world-size N --port P --parent PID`
                            |                       log: LOG_DIRECTORY/rank1.log
                            +-- a thread that looks after the children

Whoever dies takes the others along: a dead child ends the parent with its last words, a dead parent (SIGKILL too) ends the
children. Whoever hangs is named after a few steps' time (after seconds, where items are shared out) and ends the run after
``hang_minutes``. A request to stop (:mod:`qvgen.stop_request`) is the parent's alone, and acted on here where rank 0 waits in
a collective. No torch is needed.
"""

from __future__ import annotations

import logging
import math
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, NoReturn, Self

from qvgen import stop_request, work_item
from qvgen.errors import UnfitEnvironmentError
from qvgen.training.distributed import heartbeat
from qvgen.training.distributed.child import GO, READ, SAMPLE, START
from qvgen.training.distributed.child_command import free_port
from qvgen.training.distributed.foreign_launcher import forget_ranks
from qvgen.training.distributed.item_watch import ItemWatch
from qvgen.training.distributed.last_words import last_words
from qvgen.training.distributed.plain_group import leave_group
from qvgen.training.distributed.silence import BAD_ENVIRONMENT, SilenceWatch
from qvgen.training.distributed.unnamed_file import name_file, unnamed_files
from qvgen.unfinished import delete_unfinished
from qvgen.worker_signals import held_back

log = logging.getLogger(__name__)

POLL_SECONDS = 0.1
GRACE_SECONDS = 10.0
"""How long rank 0 has to notice by itself that a child died (a collective that fails) before it is ended."""
SHARING_GRACE_SECONDS = 1.0
"""The same where it is busy with items of its own and waits for nobody: it would notice when the last one is done."""
JOIN_SECONDS = 60.0
"""How long the children have to end after rank 0 is done."""


class WorkerGroup:
    """The processes of ranks 1 .. world_size-1 while the block of a ``with`` statement runs rank 0's share.

    The block runs in the thread that the group was entered in, which must outlive it (Linux ties the children to that
    thread). Leaving it normally waits for the children; leaving it by an exception ends them. :meth:`start` starts them
    before that: they import, and wait (child.py) until the group is entered; :meth:`start_ahead` before they have a folder.

    Args:
        command: Of a child; its ranks are added.
        world_size: All processes, rank 0 included.
        log_directory: For ``rank1.log`` and so on.
        hang_minutes: The run is ended after so long without a report of any rank; None: never. It is longer
            before rank 0 has done some steps, because loading and compiling take their time.
        shares_items: The processes share out videos, clips or measurements, and train nothing.

    Attributes:
        world_size: All processes, rank 0 included.
        port: TCP port where the processes find each other, at 127.0.0.1.
        given: All that it was made of; groups of which that is equal are of the same processes.

    Raises:
        RuntimeError: On leaving, if a child died or did not end; rank, exit code and the end of its log are named.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        world_size: int,
        log_directory: Path,
        hang_minutes: float | None = None,
        shares_items: bool = False,
    ) -> None:
        self.world_size = world_size
        self.port = free_port()
        self._command = list(command)
        self._log_directory = log_directory
        self.given = (self._command, world_size, log_directory, hang_minutes)
        self._children: dict[int, subprocess.Popen[bytes]] = {}
        self._unnamed_logs: list[BinaryIO] = []
        self._is_started = self._is_entered = False
        self._shares_items = shares_items
        self._reading = threading.Lock()
        self._left = threading.Event()
        self._pulse = heartbeat.Pulse()
        self._silence = SilenceWatch(
            self._pulse, hang_minutes=hang_minutes, describe=self._describe_silence, end=self._end_now
        )
        self._items = ItemWatch(
            self._pulse,
            hang_minutes=hang_minutes,
            key="hang_minutes" if shares_items else "training.hang_minutes",
            name=self._process_words,
            end=self._end_now,
        )
        self._own_end: int | None = None
        self._watcher = threading.Thread(target=self._watch, name="watch_workers", daemon=True)

    def start(self) -> None:
        """Start the children, or let those begin that wait; whoever calls it enters the group, or ends them by :meth:`end`.

        What they read is there when it is called.
        """
        self._log_directory.mkdir(parents=True, exist_ok=True)
        if not self._children:
            self._start_all(lambda rank: self._log_file(rank).open("wb"))
        for rank, log_file in enumerate(self._unnamed_logs, start=1):
            name_file(log_file, self._log_file(rank))
        self._is_started = True
        self._tell(READ)
        self._watcher.start()

    def start_ahead(self) -> bool:
        """Start the children while this process is still busy: they import, and wait for :meth:`start`.

        Until then their logs have no names: a run that is refused leaves nothing. False where the disk has no such files.
        """
        self._unnamed_logs = unnamed_files(self._log_directory, self.world_size - 1)
        if self._unnamed_logs:
            self._start_all(lambda rank: os.fdopen(os.dup(self._unnamed_logs[rank - 1].fileno()), "wb"))
        return bool(self._unnamed_logs)

    def _start_all(self, open_log: Callable[[int], BinaryIO]) -> None:
        ends = self._pulse.open(self.world_size)
        self._own_end = ends[0]
        with held_back():
            for rank in range(1, self.world_size):
                with open_log(rank) as log_file:
                    self._children[rank] = self._start(rank, log_file, beats=ends[rank])
                os.close(ends[rank])

    def __enter__(self) -> Self:
        if not self._is_started:
            self.start()
        heartbeat.report_to(self._own_end)
        self._pulse.begin()
        self._is_entered = True
        self._tell(GO)
        for child in self._children.values():
            assert child.stdin is not None
            with suppress(BrokenPipeError):
                child.stdin.close()
        return self

    def ask(self) -> None:
        """Let the children take part in the start, before the group is entered."""
        self._tell(START)

    def ask_calibration(self) -> None:
        """Let the children take part in what is sampled for the start."""
        self._tell(SAMPLE)

    def check(self) -> None:
        """Raise UnfitEnvironmentError where a child is gone that was asked."""
        if last_words := self._first_failure():
            raise UnfitEnvironmentError(last_words)

    def _tell(self, message: bytes) -> None:
        for child in self._children.values():
            assert child.stdin is not None
            with suppress(BrokenPipeError):  # it died, which whoever looks after the children reports
                child.stdin.write(message)
                child.stdin.flush()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop_watching()
        heartbeat.report_to(None)
        try:
            if error is None:
                self.join(timeout_s=JOIN_SECONDS)
            elif isinstance(error, RuntimeError) and (last_words := self._first_failure(wait_seconds=5.0)):
                raise UnfitEnvironmentError(last_words) from error  # a collective failed because a child is gone
        finally:
            self.end()
            leave_group()

    def _start(self, rank: int, log_file: BinaryIO, *, beats: int) -> subprocess.Popen[bytes]:
        ranks = {"rank": rank, "world-size": self.world_size, "port": self.port, "beats": beats, "parent": os.getpid()}
        command = self._command + [text for name, value in ranks.items() for text in (f"--{name}", str(value))]
        environment = dict(os.environ)
        forget_ranks(environment)
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))  # the child imports what we import
        return subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=log_file, stderr=subprocess.STDOUT, pass_fds=[beats]
        )

    def _watch(self) -> None:
        """End this process if a child died or hangs, and the main thread waits in compiled code, or makes the start."""
        while not self._left.wait(POLL_SECONDS):
            self._read()
            if self._first_failure() is None:
                if self._is_entered and not self._shares_items:
                    self._silence.look()
                else:  # rank 0 makes the start meanwhile, and reports nothing
                    self._items.look(with_rank_0=self._is_entered)
            elif not self._left.wait(GRACE_SECONDS if self._waits_for_others else SHARING_GRACE_SECONDS):
                sys.stderr.write(f"qvgen: {self._first_failure()}\n")
                sys.stderr.flush()
                self._end_children()
                delete_unfinished()
                os._exit(BAD_ENVIRONMENT)

    @property
    def _waits_for_others(self) -> bool:
        """Whether rank 0 meets the others in every step, whose collectives fail when one is gone."""
        return self._is_entered and not self._shares_items

    def _read(self) -> None:
        with self._reading:  # the main thread asks, too
            self._pulse.read()

    def _stop_watching(self) -> None:
        self._left.set()
        if self._watcher.is_alive():
            self._watcher.join()

    def _describe_silence(self) -> str:
        return self._pulse.describe([self._process_words(rank) for rank in range(self.world_size)])

    def _process_words(self, rank: int) -> str:
        return work_item.process_words(self._children[rank].pid if rank else os.getpid(), host=socket.gethostname())

    def _end_now(self, code: int | None, why: str) -> NoReturn:  # without waiting: the kernel may hold a child
        for child in self._children.values():
            child.kill()
        stop_request.end_now(code, why=why)

    def _first_failure(self, *, wait_seconds: float = 0.0) -> str | None:
        """What to say about the first child that ended with another code than 0, or None."""
        deadline = time.monotonic() + wait_seconds
        while True:
            for rank, child in self._children.items():
                if child.poll():
                    self._read()
                    item = self._pulse.beats[rank].item if self._pulse.beats else ""
                    return last_words(rank, child.returncode, log_file=self._log_file(rank), item=item)
            if time.monotonic() >= deadline:
                return None
            time.sleep(POLL_SECONDS)

    def join(self, *, timeout_s: float | None = None) -> None:
        """Wait until the children are done: as long as they need, or for ``timeout_s`` seconds.

        Raises:
            RuntimeError: A child died or did not end in time.
        """
        deadline = math.inf if timeout_s is None else time.monotonic() + timeout_s
        for rank, child in self._children.items():
            try:
                child.wait(None if timeout_s is None else max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired as expired:
                raise UnfitEnvironmentError(
                    f"the process of rank {rank} did not end within {timeout_s:.0f} s of rank 0; "
                    f"see {self._log_file(rank)}"
                ) from expired
        self.check()

    def end(self) -> None:
        """End the children that still run."""
        self._stop_watching()
        self._end_children()

    def _end_children(self) -> None:
        for child in self._children.values():
            if child.poll() is None:
                child.kill()
            child.wait()
            assert child.stdin is not None
            child.stdin.close()
        for log_file in self._unnamed_logs:
            log_file.close()
        self._pulse.close()
        if self._own_end is not None:
            os.close(self._own_end)
            self._own_end = None

    def _log_file(self, rank: int) -> Path:
        return self._log_directory / f"rank{rank}.log"
