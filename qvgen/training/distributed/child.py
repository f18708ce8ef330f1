"""The side of a child that launcher.py starts: it ends with its parent, and waits for it to begin."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable

from qvgen.training.distributed import heartbeat
from qvgen.worker_signals import ignore_in_worker

READ = b"read\n"
"""A child reads this first, once its configuration is there: one that was started ahead has only imported until then."""
GO = b"go\n"
"""A child reads this from its standard input once rank 0 begins to train."""
START = b"start\n"
"""A child may read this before: rank 0 has begun with the start, and asks for help with the layers."""
SAMPLE = b"sample\n"
"""A child may read this before both: rank 0 asks for help with what it samples for the start."""
_PR_SET_PDEATHSIG = 1


def follow_parent(parent: int, *, beats: int | None = None) -> None:
    """Make this process end when process ``parent`` does, however that one ends; call it first thing in a child.

    Requests to stop are left to the parent.

    Args:
        parent: Its number.
        beats: Where this process reports what it does.
    """
    heartbeat.report_to(beats)
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(heartbeat.TICK_SECONDS / 2)
            heartbeat.report(heartbeat.TICK)
        os._exit(1)

    if os.getppid() != parent:
        os._exit(1)  # it died before we asked to be told
    threading.Thread(target=watch, name="follow_parent", daemon=True).start()
    ignore_in_worker()


def wait_for_settings() -> None:
    """Wait until this process's configuration is written; end where it never will be."""
    if sys.stdin.readline() != READ.decode():
        sys.exit(1)


def wait_for_group(*, help_start: Callable[[], None], help_calibration: Callable[[], None]) -> None:
    """Wait until rank 0 enters the group of processes that this one belongs to; end where it never will.

    Args:
        help_start: Called where rank 0 asks for help with the start's layers before that.
        help_calibration: Called where it asks for help with what is sampled for them.
    """
    helps = {START.decode(): help_start, SAMPLE.decode(): help_calibration}
    heartbeat.report(heartbeat.WAITING)
    while (line := sys.stdin.readline()) != GO.decode():
        if line not in helps:
            sys.exit(1)
        helps[line]()
        heartbeat.report(heartbeat.WAITING)
    heartbeat.report(heartbeat.STARTING)
