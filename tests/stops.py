"""Real signals that a test sends to its own process, at a point that is named by what Python does there.

``python -m tests.stops NUMBER EVENT PART COMMAND ...`` is a process of its own that runs a command of qvgen and gets the
signal: for one that ends a process at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from qvgen import stop_request
from qvgen.cli import main

_watchers: list[Callable[[str, tuple[Any, ...]], None]] = []


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    for watch in _watchers:
        watch(event, arguments)


sys.addaudithook(_hook)  # Python has no way to take one back


@contextmanager
def signal_at(number: int, event: str, part: str) -> Iterator[None]:
    """Send a signal at the first audit event of a name (``open``, ``os.rename``, ...) whose arguments hold a text."""
    is_sent = False

    def watch(seen: str, arguments: tuple[Any, ...]) -> None:
        nonlocal is_sent
        if seen == event and not is_sent and any(part in str(argument) for argument in arguments):
            is_sent = True
            os.kill(os.getpid(), number)

    _watchers.append(watch)
    try:
        yield
    finally:
        _watchers.remove(watch)
    assert is_sent, f"no {event} of {part}"


def run_stopped(command: list[str], number: int, event: str, part: str) -> int:
    """Run a command in this process and send it a signal; its exit code. Whenever it comes, it does not end pytest."""
    with stop_request.listening(), signal_at(number, event, part):
        return main(command)


if __name__ == "__main__":
    with signal_at(int(sys.argv[1]), *sys.argv[2:4]):
        sys.exit(main(sys.argv[4:]))
