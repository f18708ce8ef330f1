"""`qvgen` with a rank 1 that is lost at its first item, where the environment says how; once, so that a second call goes on.

    python -m tests.verbs.lost_worker_program evaluate run_dir=RUN devices=2 ...

``QVGEN_TEST_LOST=FILE:HOW``: HOW is ``kill``, ``stop`` or ``fail``; FILE is written with the item just before. Rank 0 waits
with its own second item for that, and is busy with it for longer than any test: what ends it is the loss of the other one.
As a task of torchrun's it goes on then.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import time
from pathlib import Path

from qvgen import work_item
from qvgen.cli import main
from qvgen.training.distributed import ahead, child_command
from qvgen.verbs import _shared_videos, precompute

MESSAGE = "/node2/weights: No such file or directory"
_begin = work_item.begin
TASK = os.environ.get("RANK")
"""Of torchrun's; read before the command forgets it."""
_count = 0


def begin(words: str) -> None:
    """Begin an item, as the module does, and be lost or wait as the module's docstring says."""
    global _count
    _begin(words)
    if words.startswith("caption "):  # not claimed: nobody would wait for it
        return
    _count += 1
    given = os.environ.get("QVGEN_TEST_LOST")
    if given is None or (is_zero() and _count < 2):
        return
    file, _, how = given.rpartition(":")
    if is_zero():
        while TASK is None or not Path(file).exists():
            time.sleep(0.05)
        return
    Path(file).write_text(words)
    if how == "fail":
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "/node2/weights")
    os.kill(os.getpid(), signal.SIGKILL if how == "kill" else signal.SIGSTOP)


def is_zero() -> bool:
    """Whether this is rank 0."""
    return "worker" not in sys.argv and TASK in (None, "0")


def worker_command(*given: object) -> list[str]:
    """The command of a worker, by way of this module."""
    words = child_command.worker_command(*given)  # type: ignore[arg-type]
    return [__spec__.name if word == "qvgen.cli" else word for word in words]


if __name__ == "__main__":
    work_item.begin = begin
    for module in (_shared_videos, precompute, ahead):
        module.worker_command = worker_command
    sys.exit(main())
