"""A TCP connection between rank 0 and each other process that another launcher started: who is gone, who is silent.

    rank r   what it does, and a tick a second (heartbeat.py)  -->  rank 0
    rank 0   a tick a second                                   -->  rank r

The kernel of a machine answers on a connection whatever its processes do. So three things are told apart that look the same
to a collective which waits: a process that is gone (its kernel closes the connection), a machine that can't be reached (its
kernel answers nothing for UNREACHABLE_SECONDS), and a process that is stopped or hangs (the connection stands). The first
two end the others, the third is said, and ends them after ``training.hang_minutes``.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from qvgen import work_item
from qvgen.training.distributed import heartbeat
from qvgen.training.distributed.launched_store import CONNECT_SECONDS
from qvgen.training.distributed.silence import SilenceWatch
from qvgen.training.distributed.watched_connection import UNREACHABLE_SECONDS, how_it_ended, watch_connection

log = logging.getLogger(__name__)

POLL_SECONDS = 0.25
GRACE_SECONDS = 10.0
"""How long a process has to notice by itself that another one is gone (a collective that fails) before it is ended."""
_HELLO_BYTES = 1024
SILENT_SECONDS = 30.0
"""After so long without a tick of rank 0 the others say so, and again whenever it has become twice as long."""


class Links(ABC):
    """This process's connections, which a thread looks after.

    Args:
        end: Ends this process, from any thread, for a reason in words.

    Attributes:
        lost: Who is gone or can't be reached, as a sentence; None while all are there.
    """

    def __init__(self, end: Callable[[str], None]) -> None:
        self._end = end
        self._pulse = heartbeat.Pulse()
        self._silence: SilenceWatch | None = None
        self._left = threading.Event()
        self._ticked_at = 0.0
        self._is_over = False
        self.lost: str | None = None
        self._thread = threading.Thread(target=self._watch, name="watch_links", daemon=True)

    def start(self) -> None:
        """Begin; :meth:`close` ends it."""
        self._thread.start()

    def close(self) -> None:
        """Say goodbye to whoever is there, so that nobody takes this process for lost."""
        self._left.set()
        if self._thread.is_alive():
            self._thread.join()
        self._say(heartbeat.LEFT)
        heartbeat.report_to(None)
        self._pulse.read()  # what is closed with something unread in it is broken off
        self._pulse.close()

    def watch_silence(self, *, hang_minutes: float | None, end: Callable[[int | None, str], None]) -> None:
        """While the processes train together: say who is silent, and end this process after ``hang_minutes``."""
        self._is_over = False
        self._pulse.begin()
        self._silence = SilenceWatch(self._pulse, hang_minutes=hang_minutes, describe=self._describe, end=end)

    def stop_watching_silence(self) -> None:
        """Stop watching the other processes: from now on it does not matter here whether they answer."""
        self._silence, self._is_over = None, True

    def _watch(self) -> None:
        while not self._left.wait(POLL_SECONDS):
            self._meet()
            self._pulse.read()
            self._lose()
            if self.lost and not self._is_over and not self._left.wait(GRACE_SECONDS):
                self._end(self.lost)
            now = time.monotonic()
            if now - self._ticked_at >= heartbeat.TICK_SECONDS:
                self._ticked_at = now
                self._say(heartbeat.TICK)
            if (silence := self._silence) is not None:
                self._look(silence)

    @abstractmethod
    def _meet(self) -> None:
        """Connect to whoever is not connected yet, without waiting long."""

    @abstractmethod
    def _say(self, what: int) -> None:
        """Tell the other side."""

    @abstractmethod
    def _describe(self) -> str:
        """Whom this process waits for."""

    @abstractmethod
    def _look(self, silence: SilenceWatch) -> None:
        """Look after who is silent."""

    @abstractmethod
    def _name(self, place: int) -> str:
        """The process of a beat, in words."""

    def _lose(self) -> None:
        """Notice whose connection has ended without a goodbye."""
        for place, beat in enumerate(self._pulse.beats):
            if beat.end is not None and beat.what != heartbeat.LEFT and self.lost is None:
                self.lost = f"{self._name(place)} {how_it_ended(beat.end)}; last seen {beat.where}"


class LinksToOthers(Links):
    """Rank 0's side, which the others connect to.

    Args:
        world_size: All processes.
        end: See Links.

    Attributes:
        told: What the others have to know, as JSON.
    """

    def __init__(self, world_size: int, *, end: Callable[[str], None]) -> None:
        super().__init__(end)
        ipv6 = {"family": socket.AF_INET6, "dualstack_ipv6": True} if socket.has_dualstack_ipv6() else {}
        self._listener = socket.create_server(("", 0), backlog=world_size, **ipv6)
        self._listener.setblocking(False)
        self._token = uuid.uuid4().hex
        port, host = self._listener.getsockname()[1], socket.gethostname()
        self.told = json.dumps({"port": port, "token": self._token, "host": host, "pid": os.getpid()})
        self._told: dict[int, dict[str, Any]] = {0: {"host": host, "pid": os.getpid()}}
        self._strangers: dict[socket.socket, float] = {}
        self._began = time.monotonic()
        self._pulse.expect(world_size)
        read_end, self._own_end = os.pipe()
        self._pulse.connect(0, read_end)
        heartbeat.report_to(self._own_end)

    def signs(self) -> dict[int, float]:
        """When each other rank gave its last sign, in seconds of ``time.monotonic``."""
        return {rank: beat.ticked_at for rank, beat in enumerate(self._pulse.beats) if rank}

    def _meet(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                break  # nobody
            connection.setblocking(False)
            self._strangers[connection] = time.monotonic()
        for connection, since in list(self._strangers.items()):
            try:
                hello = connection.recv(_HELLO_BYTES, socket.MSG_PEEK)
                is_whole = not hello or b"\n" in hello
            except BlockingIOError:
                is_whole = False
            except OSError:
                hello, is_whole = b"", True
            if is_whole or time.monotonic() - since > UNREACHABLE_SECONDS:
                del self._strangers[connection]
                if not is_whole or not self._take_in(connection, hello.partition(b"\n")[0]):
                    connection.close()

    def _take_in(self, connection: socket.socket, hello: bytes) -> bool:
        """Take whoever said this for one of the others; False: it is a stranger, who looks for open ports."""
        try:
            said = json.loads(hello)
            rank, host, pid = int(said["rank"]), str(said["host"]), int(said["pid"])
            is_ours = said["token"] == self._token and 0 < rank < len(self._pulse.beats) and rank not in self._told
        except (ValueError, TypeError, KeyError):
            return False
        if is_ours:
            connection.recv(len(hello) + 1)
            watch_connection(connection)
            self._told[rank] = {"host": host, "pid": pid}
            self._pulse.connect(rank, connection.detach())
        return is_ours

    def _say(self, what: int) -> None:
        record = heartbeat.record(what)
        for rank in self._told.keys() - {0}:
            descriptor = self._pulse.beats[rank].descriptor
            assert descriptor is not None
            with suppress(OSError):
                os.write(descriptor, record)

    def _lose(self) -> None:
        """Notice besides who never came: a process may fail before it knows where the others meet."""
        super()._lose()
        missing = sorted(set(range(len(self._pulse.beats))) - self._told.keys())
        if missing and self.lost is None and time.monotonic() - self._began > CONNECT_SECONDS:
            ranks = f"rank{'s' if len(missing) > 1 else ''} {', '.join(map(str, missing))}"
            self.lost = f"{ranks} did not come within {CONNECT_SECONDS:.0f} s; see the output of that process"

    def _look(self, silence: SilenceWatch) -> None:
        silence.look()

    def _describe(self) -> str:
        return self._pulse.describe([self._process(rank) for rank in range(len(self._pulse.beats))])

    def _name(self, place: int) -> str:
        return f"rank {place} ({self._process(place)})"

    def _process(self, rank: int) -> str:
        if rank not in self._told:
            return "not connected"
        host, pid = self._told[rank]["host"], self._told[rank]["pid"]
        return work_item.process_words(pid, host=host) if host == socket.gethostname() else f"process {pid} on {host}"

    def close(self) -> None:
        """Say goodbye, and take nobody in any more."""
        super().close()
        self._listener.close()
        os.close(self._own_end)
        for connection in self._strangers:
            connection.close()


class LinkToRankZero(Links):
    """Another rank's side.

    Args:
        rank: This process.
        address: Name or address of rank 0's machine.
        ask: What rank 0 has to tell (``LinksToOthers.told``), once it can be had; None: not yet.
        end: See Links.
    """

    def __init__(self, rank: int, *, address: str, ask: Callable[[], str | None], end: Callable[[str], None]) -> None:
        super().__init__(end)
        self._rank, self._address, self._ask = rank, address, ask
        self._zero = "rank 0"
        self._said_seconds = 0.0

    def _meet(self) -> None:
        if self._pulse.beats or self.lost or (found := self._ask()) is None:
            return
        told = json.loads(found)
        self._zero = f"rank 0 (process {told['pid']} on {told['host']})"
        try:
            connection = socket.create_connection((self._address, told["port"]), timeout=UNREACHABLE_SECONDS)
            own = {"token": told["token"], "rank": self._rank, "host": socket.gethostname(), "pid": os.getpid()}
            connection.sendall(json.dumps(own).encode() + b"\n")
        except OSError as error:
            self.lost = f"{self._zero} can't be reached at {self._address}:{told['port']} ({error})"
            return
        watch_connection(connection)
        descriptor = connection.detach()
        self._pulse.expect(1)
        self._pulse.connect(0, descriptor)
        heartbeat.report_to(descriptor)

    def _say(self, what: int) -> None:
        heartbeat.report(what)

    def _look(self, silence: SilenceWatch) -> None:
        """Rank 0 says who of the others is silent; here it is rank 0 itself."""
        if not self._pulse.beats:
            return
        beat = self._pulse.beats[0]
        beat.at, silent = beat.ticked_at, time.monotonic() - beat.ticked_at
        silence.end_if_hung(silent, is_training=True)
        if silent > max(SILENT_SECONDS, 2 * self._said_seconds):
            self._said_seconds = silent
            log.warning("%s", self._describe())
        elif self._said_seconds and silent < SILENT_SECONDS:
            log.warning("%s gives signs of life again, after %.0f s or more", self._zero, self._said_seconds)
            self._said_seconds = 0.0

    def _describe(self) -> str:
        silent = time.monotonic() - self._pulse.beats[0].ticked_at
        return f"{self._zero} gives no sign of life for {silent:.0f} s, but its machine answers"

    def _name(self, place: int) -> str:
        del place
        return self._zero
