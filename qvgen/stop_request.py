"""A request to stop by SIGINT, SIGTERM or SIGUSR1: noticed whatever the process does, acted on where nothing is lost.

    first signal     raises Stopped in the main thread; while `postpone()` holds (training) it only sets a flag, which is
                     looked at between steps
    nobody listens   the main thread is in compiled code, a decomposition or a file of many GB: ended after GRACE_SECONDS
    second signal    the process ends at once, also from inside of a collective

Signals reach Python's handlers only between bytecodes, so a thread reads them from the wakeup descriptor as well. Ending a
process anywhere is safe: every file is written beside its place and renamed, and what was half-written is deleted
(:mod:`qvgen.unfinished`). Files that belong together are put in place in one piece (:func:`undivided`).

The last line that a stopped command prints says what is saved and how to go on. Whoever saves something says so by
:func:`note`. Jobs of a sweep that were not begun stand below it, each with its command.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from qvgen.config.command_line import Value, job_command
from qvgen.unfinished import delete_unfinished

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""SIGUSR1 is what SLURM is usually asked to send before a time limit (``--signal=USR1@300``)."""

INTERRUPTED, TERMINATED = 130, 143
"""Exit codes: after SIGINT; after SIGTERM and SIGUSR1."""

GRACE_SECONDS = 10.0
"""How long the main thread has to end what it does, where stopping is not postponed."""

POLL_MS = 200
_CLOSED = 0  # written to the pipe to end the thread; no signal has this number
_NOTHING = "before it was done"


class Stopped(BaseException):
    """Raised in the main thread by the first signal, or between two steps. No Exception: nothing but the CLI ends it."""


def exit_code(number: int) -> int:
    """Of a process that signal ``number`` stopped."""
    return INTERRUPTED if number == signal.SIGINT else TERMINATED


class _Listener:
    """The signals of a process while it runs commands.

    Attributes:
        number: The first signal that came; None so far.
        num_forwarded: Signals that this process sent itself, see :func:`forward`.
        saved: What a stop leaves behind: "before it was done", "after step 9, saved".
        changes: Overrides of the command that continues; None: it begins again.
        how: What the command is said to do; None: to continue, or to start again where there are no changes.
        not_begun: Commands of the sweep's further jobs.
        is_postponed: Whether the first signal only sets a flag.
        is_said: Held once the last line was said.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self.num_forwarded = 0
        self.is_postponed = self._is_raised = False
        self._since = 0.0
        self.saved = _NOTHING
        self.changes: dict[str, Value] | None = None
        self.how: str | None = None
        self.not_begun: tuple[str, ...] = ()
        self.is_said = threading.Lock()

    def start(self) -> None:
        """Take over the signals; only the main thread can."""
        self._read_end, self._write_end = os.pipe()
        os.set_blocking(self._write_end, False)
        self._previous = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        self._previous_fd = signal.set_wakeup_fd(self._write_end, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._watch, name="stop_request", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Give the signals back."""
        self.hand_back()
        os.write(self._write_end, bytes([_CLOSED]))
        self._thread.join()
        os.close(self._read_end)
        os.close(self._write_end)

    def hand_back(self) -> None:
        """Leave the signals to who had them before; also what a forked child does, whose signals are its own."""
        signal.set_wakeup_fd(self._previous_fd, warn_on_full_buffer=False)
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def postpone(self, is_postponed: bool) -> None:
        """Whether the first signal only sets a flag."""
        self.is_postponed, self._since = is_postponed, time.monotonic()

    def last_line(self) -> str:
        """What is said at the end, and a line for each job that was not begun; nothing when it has been said."""
        if not self.is_said.acquire(blocking=False):
            return ""
        how = self.how or ("start again" if self.changes is None else "continue")
        lines = [f"stopped {self.saved}; {how} with: {job_command(changes=self.changes)}"]
        lines += [f"not begun: {command}" for command in self.not_begun]
        return "".join(f"{line}\n" for line in lines)

    def end(self, code: int, why: str = "") -> NoReturn:
        """End the process from any thread, with the last line; Linux ends its workers along with it."""
        # Past Python's buffers, whose locks the main thread may hold; a progress bar leaves its line open.
        os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"\n{why}{self.last_line()}".encode())
        delete_unfinished()
        os._exit(code)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        del frame
        self.number = self.number or number
        if not self.is_postponed and not self._is_raised:
            self._is_raised = True  # once: a second signal must not break what the first one cleans up
            raise Stopped

    def _watch(self) -> None:
        count, poll = 0, select.poll()
        poll.register(self._read_end, select.POLLIN)
        while True:
            received = os.read(self._read_end, 64) if poll.poll(POLL_MS if count else None) else b""
            if _CLOSED in received:
                return
            signals = [number for number in received if number in SIGNALS]
            if signals and not count:
                self._since = time.monotonic()
                self.number = self.number or signals[0]
            count += len(signals)
            if not count:
                continue
            assert self.number is not None
            is_late = not self.is_postponed and time.monotonic() - self._since > GRACE_SECONDS
            if count - self.num_forwarded > 1 or is_late:
                self.end(exit_code(self.number))


_listener: _Listener | None = None


@contextmanager
def listening() -> Iterator[None]:
    """Take requests to stop while the block runs; in another thread than the main one nothing can be taken."""
    global _listener
    if threading.current_thread() is not threading.main_thread() or _listener is not None:
        yield
        return
    _listener = _Listener()
    _listener.start()
    try:
        yield
    finally:
        ended, _listener = _listener, None
        ended.close()


_fork = threading.local()


def _before_fork() -> None:
    """Hold signals back: one that reaches the child before it is on its own would be taken for the parent's."""
    _fork.mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS if _listener is not None else ())


def _after_fork() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _fork.mask)


def _in_forked_child() -> None:
    global _listener
    if _listener is not None:
        _listener.hand_back()
        _listener = None
    _after_fork()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_in_forked_child)


def is_requested() -> bool:
    """Whether a signal came."""
    return number() is not None


def number() -> int | None:
    """The first signal that came; None so far."""
    return None if _listener is None else _listener.number


def forward(number: int) -> None:
    """Stop this process as the signal did that another process got; if it comes here too, it does not count as a second."""
    if _listener is not None and _listener.number is None:
        _listener.num_forwarded = 1
        os.kill(os.getpid(), number)


def adopt(number: int) -> None:
    """End with the exit code of the signal that another process was sent, where this one was sent none."""
    if _listener is not None and _listener.number is None:
        _listener.number = number


def be_silent() -> None:
    """Leave it to another process of the run to say what is saved and how to go on."""
    if _listener is not None:
        _listener.is_said.acquire(blocking=False)


def is_postponed_request() -> bool:
    """Whether a signal came and waits for the end of a step."""
    return _listener is not None and _listener.number is not None and _listener.is_postponed


def check() -> None:
    """Raise Stopped where a signal came while stopping was postponed."""
    if is_requested():
        raise Stopped


@contextmanager
def undivided() -> Iterator[None]:
    """Put files that belong together in place in here: a first signal stops behind the block. For moments only."""
    if _listener is None or _listener.is_postponed:  # who postpones looks by itself
        yield
        return
    _listener.postpone(True)
    try:
        yield
    finally:
        _listener.postpone(False)
    check()


def postpone(is_postponed: bool) -> None:
    """True: from now on the first signal only sets the flag of :func:`is_requested`; False: it raises Stopped again."""
    if _listener is not None:
        _listener.postpone(is_postponed)


def note(saved: str = _NOTHING) -> None:
    """Say what a stop would leave behind from now on, for example ``after step 9, saved``."""
    if _listener is not None:
        _listener.saved = saved


def continue_with(changes: Mapping[str, Value] | None, *, how: str | None = None) -> None:
    """Say by which changes of its command the present job is continued; None: it would begin again.

    Args:
        changes: Overrides.
        how: What the command does, where it is not to continue: ``start again``.
    """
    if _listener is not None:
        _listener.changes, _listener.how = None if changes is None else dict(changes), how


def not_begun(commands: Sequence[str]) -> None:
    """Say by which commands the jobs of a sweep are done that come after the present one."""
    if _listener is not None:
        _listener.not_begun = tuple(commands)


def say_end() -> int:
    """Print the last line of a stopped command, and those of jobs that were not begun; returns its exit code."""
    if _listener is None:
        return INTERRUPTED
    sys.stderr.write(_listener.last_line())
    sys.stderr.flush()
    return exit_code(_listener.number or signal.SIGINT)


def end_now(code: int | None = None, *, why: str = "") -> NoReturn:
    """End the process from any thread: with the last line, and ``why`` before it.

    Args:
        code: Exit code; None: the one of the signal that came.
        why: What else there is to say, with its separator.
    """
    if _listener is not None:
        _listener.end(exit_code(_listener.number or signal.SIGINT) if code is None else code, why)
    sys.stderr.write(f"{why}stopped\n")
    sys.stderr.flush()
    os._exit(INTERRUPTED if code is None else code)
