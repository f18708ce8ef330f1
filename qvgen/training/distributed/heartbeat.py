"""Signs of life of the processes of a run: what each reports, and what a reader can say about one that does not.

    rank 0   report(COMPUTING, step=7) --pipe--+
    rank 1   report(...) and a tick a second --+--> Pulse, in rank 0's watching thread

All processes wait for each other in every step, so that a rank that hangs makes all of them silent. Who is to blame is told
by what came last: the rank whose process gives no tick any more (stopped, swapped out, lost in the kernel), else the one
that came least far. A process that nobody reads (there is only one, or a test) reports nothing. Between machines a TCP
connection stands in the place of the pipe (:mod:`qvgen.training.distributed.peer_links`).
"""

from __future__ import annotations

import os
import statistics
import struct
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from qvgen import work_item

TICK, STARTING, COMPUTING, BACKWARD, DONE, SAVING, MEASURING, WAITING, DELIVERING, LEFT, ITEM = range(11)
"""What a process does; DONE is the end of an optimizer step, MEASURING also samples videos. When training is over, rank 0 is
DELIVERING, and WAITING when nothing is left but videos of the others. LEFT: it takes part no more, since no video is left to
take or it ends, and is not missed. ITEM is followed by so many bytes of words as its number says (:mod:`qvgen.work_item`)."""

_NAMES = (
    "",
    "starting",
    "computing",
    "in the backward pass",
    "done",
    "saving",
    "measuring or sampling",
    "waiting for the others",
    "at the end of the run",
    "left",
    "at an item",
)
_RECORD = struct.Struct("<bq")
TICK_SECONDS = 1.0
LOST_SECONDS = 4.0
"""A process without a tick for so long does not run."""

PAUSE_SECONDS = 3.0
"""A reader that was not there for so long was stopped itself."""

MAX_ITEM_BYTES = 200
"""Of what is said about an item."""

KEPT_STEPS = 31
"""So many step times make the median."""

_descriptor: int | None = None
_step, _what = 0, STARTING
_unsent = b""  # a connection whose reader was stopped for hours may take part of a record
_writing = threading.Lock()


def report_to(descriptor: int | None) -> None:
    """From now on this process writes its reports there; None: nowhere."""
    global _descriptor, _step, _unsent
    _descriptor, _step, _unsent = descriptor, 0, b""
    work_item.tell(None if descriptor is None else _report_item)
    if descriptor is not None:
        os.set_blocking(descriptor, False)


def report(what: int, *, step: int | None = None) -> None:
    """Say what this process does now, in the optimizer step that it said last unless another one is given."""
    global _step, _what
    _step = _step if step is None else step
    _what = _what if what == TICK else what
    _write(_RECORD.pack(what, _step))


def _report_item(words: str | None) -> None:
    """Say which item this process is busy with; None: it waits for what another one makes."""
    if words is None:
        report(WAITING)
    else:
        text = words.encode()[:MAX_ITEM_BYTES]
        _write(_RECORD.pack(ITEM, len(text)) + text)


def _write(data: bytes) -> None:
    global _unsent
    if _descriptor is not None:
        with _writing, suppress(OSError):  # nobody reads now, or any more: whoever waits for the reader sees that
            data = _unsent + data
            _unsent = data[os.write(_descriptor, data) :]


def record(what: int) -> bytes:
    """A report of this process as it is written, for who has several readers."""
    return _RECORD.pack(what, _step)


def report_change(what: int) -> None:
    """Say what this process does now, unless it said so last: who waits does not report for those that it waits for."""
    if what != _what:
        report(what)


def last_step() -> int:
    """The optimizer step that this process reported last, whether anybody reads that or not."""
    return _step


@dataclass
class Beat:
    """What is known of a process.

    Attributes:
        step: The optimizer step that it is in.
        what: One of the module's words.
        at: When it reported that, in seconds of the clock of :class:`Pulse`.
        ticked_at: When it gave any sign.
        descriptor: What its reports are read from; None: nothing yet.
        item: What it is busy with, or was before it waited; "" where that is a step.
        is_there: Whether it has given any sign.
        end: Why no more reports can come, without an error's words where the other side closed; None: they can.
    """

    descriptor: int | None
    at: float
    ticked_at: float
    step: int = 0
    what: int = STARTING
    rest: bytes = b""
    is_there: bool = False
    item: str = ""
    end: str | None = None

    @property
    def where(self) -> str:
        """What it did last, in words."""
        if self.item and self.what == WAITING:
            return f"{_NAMES[WAITING]} behind {self.item}"
        return self.item or f"{_NAMES[self.what]}, step {self.step}"

    def take(self, received: bytes, now: float) -> Iterator[int]:
        """Take in what was received; yields what it reported, but for ticks and items."""
        data = self.rest + received
        self.ticked_at, self.is_there, place = now, True, 0
        while place + _RECORD.size <= len(data):
            what, step = _RECORD.unpack_from(data, place)
            end = place + _RECORD.size + (step if what == ITEM else 0)
            if end > len(data):
                break
            if what == ITEM:
                self.item, self.what, self.at = data[place + _RECORD.size : end].decode(errors="replace"), ITEM, now
            elif what != TICK:
                self.what, self.step, self.at = what, step, now
                self.item = self.item if what in (LEFT, WAITING) else ""
                yield what
            place = end
        self.rest = data[place:]


@dataclass
class Pulse:
    """The reports of all processes of a run, read without waiting.

    Attributes:
        beats: The last one of each rank.
        step_seconds: The last steps of rank 0.
    """

    beats: list[Beat] = field(default_factory=list)
    step_seconds: deque[float] = field(default_factory=lambda: deque(maxlen=KEPT_STEPS))
    _step_began: float | None = None
    _read_at: float | None = None

    def open(self, world_size: int) -> list[int]:
        """Make a pipe for every rank; returns the ends to write to."""
        ends = [os.pipe() for _ in range(world_size)]
        now = time.monotonic()
        for read_end, _ in ends:
            os.set_blocking(read_end, False)
            self.beats.append(Beat(descriptor=read_end, at=now, ticked_at=now))
        return [write_end for _, write_end in ends]

    def expect(self, world_size: int) -> None:
        """Wait for so many ranks, each of which comes by :meth:`connect`."""
        now = time.monotonic()
        self.beats += [Beat(descriptor=None, at=now, ticked_at=now) for _ in range(world_size)]

    def connect(self, rank: int, descriptor: int) -> None:
        """Read a rank's reports from a descriptor, which is closed with the others."""
        os.set_blocking(descriptor, False)
        self.beats[rank].descriptor, self.beats[rank].ticked_at = descriptor, time.monotonic()

    def begin(self) -> None:
        """Forget the time that went by before the processes began."""
        now = time.monotonic()
        for beat in self.beats:
            beat.at = beat.ticked_at = now

    def close(self) -> None:
        """Close what is read from."""
        for beat in self.beats:
            if beat.descriptor is not None:
                os.close(beat.descriptor)
        self.beats.clear()

    def read(self) -> None:
        """Take in what was reported since the last call; time in which nobody called does not count.

        A whole job is stopped and continued by Ctrl-Z, or by SLURM's `scontrol suspend`: nobody hangs then.
        """
        now = time.monotonic()
        if self._read_at is not None and (pause := now - self._read_at) > PAUSE_SECONDS:
            self._step_began = None
            for beat in self.beats:
                beat.at, beat.ticked_at = beat.at + pause, beat.ticked_at + pause
        self._read_at = now
        for rank, beat in enumerate(self.beats):
            if beat.descriptor is None or beat.end is not None:
                continue
            try:
                received = os.read(beat.descriptor, 1 << 16)
            except BlockingIOError:
                continue
            except OSError as error:
                beat.end = os.strerror(error.errno or 0)
                continue
            if not received:
                beat.end = ""  # it has ended, which the launcher sees
                continue
            for what in beat.take(received, now):
                self._count(rank, what, now)

    def _count(self, rank: int, what: int, now: float) -> None:
        """Measure rank 0's steps, from the end of one to the end of the next, but for what lies between them."""
        if rank != 0:
            return
        if what == DONE:
            if self._step_began is not None:
                self.step_seconds.append(now - self._step_began)
            self._step_began = now
        elif what in (SAVING, MEASURING, STARTING, WAITING, DELIVERING):
            self._step_began = None

    def median_seconds(self) -> float | None:
        """Of a step; None before there was one to measure."""
        return statistics.median(self.step_seconds) if self.step_seconds else None

    def silent_seconds(self) -> float:
        """Since any process reported something: all wait for each other."""
        return time.monotonic() - max(beat.at for beat in self.beats)

    def is_at_the_end(self) -> bool:
        """Whether rank 0 does what comes behind training, and waits for nobody."""
        return self.beats[0].what == DELIVERING

    def is_slow(self) -> bool:
        """Whether a process does what takes longer than a step, and reports only now and then."""
        return any(beat.what in (SAVING, WAITING) for beat in self.beats)

    def is_left_alone(self) -> bool:
        """Whether rank 0 computes, while another one still samples videos of the step before, and has said so since."""
        first, *others = self.beats
        return first.what in (COMPUTING, BACKWARD) and any(b.what == MEASURING and b.at > first.at for b in others)

    def who(self) -> list[int]:
        """The ranks that the others wait for."""
        now, there = time.monotonic(), [rank for rank, beat in enumerate(self.beats) if beat.what != LEFT]
        lost = [rank for rank in there if now - self.beats[rank].ticked_at > LOST_SECONDS and rank != 0]
        if lost:
            return lost
        came = {rank: (self.beats[rank].step, self.beats[rank].what) for rank in there}
        return [rank for rank in there if came[rank] == min(came.values())]

    def describe(self, names: Sequence[str]) -> str:
        """One sentence about the ranks that the others wait for: since when, and where they were.

        Args:
            names: The processes of all ranks, as :func:`qvgen.work_item.process_words` has them.
        """
        return "; ".join(self.describe_one(rank, names[rank]) for rank in self.who())

    def describe_one(self, rank: int, name: str) -> str:
        """The same about one rank, whose process is called ``name``."""
        beat = self.beats[rank]
        clock = time.strftime("%H:%M:%S", time.localtime(time.time() - (ago := time.monotonic() - beat.at)))
        return f"rank {rank} ({name}) has not reported since {clock}, {ago:.0f} s ago: {beat.where}"
