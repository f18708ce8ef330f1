"""The line about a process of this machine that ended before it should: how, what it was busy with, and what it said last."""

from __future__ import annotations

import signal
import socket
from pathlib import Path


def last_words(rank: int, code: int, *, log_file: Path, item: str = "") -> str:
    """What to say about a process that is gone.

    Args:
        rank: Whose.
        code: Its exit code; -N where signal N killed it.
        log_file: Where it wrote.
        item: What it said last that it was busy with (:mod:`qvgen.work_item`).

    Example:
        >>> last_words(1, 3, log_file=Path("no/such/rank1.log"), item="video 2 of 8")  # doctest: +ELLIPSIS
        'the process of rank 1 on ... ended with exit code 3 at video 2 of 8: no output (see no/such/rank1.log)'
    """
    how = f"was killed by signal {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    try:
        text = log_file.read_text(errors="replace")
    except OSError:
        text = ""
    lines = [line for line in text.splitlines() if line.strip()]
    said = lines[-1].strip() if lines else "no output"
    at = f" at {item}" if item else ""
    return f"the process of rank {rank} on {socket.gethostname()} {how}{at}: {said} (see {log_file})"
