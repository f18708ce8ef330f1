"""Signals in further processes of a command: stopping is left to the process that the user started."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from qvgen.stop_request import SIGNALS


def ignore_in_worker() -> None:
    """Leave stopping to the process that the user started: Ctrl-C reaches all of a terminal's processes."""

    def do_nothing(number: int, frame: FrameType | None) -> None:
        """A handler, and not SIG_IGN, which further processes would inherit."""
        del number, frame

    for number in SIGNALS:
        signal.signal(number, do_nothing)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


@contextmanager
def held_back() -> Iterator[None]:
    """Start processes in here: they begin with the signals blocked, until :func:`ignore_in_worker`."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
