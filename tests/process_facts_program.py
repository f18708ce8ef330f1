"""A program that prints as JSON what it was given when it began, and what a worker that it starts was given."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from typing import Any

WORKER = [sys.executable, "-m", "tests.process_facts_program", "worker"]


def facts() -> dict[str, Any]:
    """What a process can know of itself, but for numbers of processes."""
    signals = [number for number in signal.valid_signals() if isinstance(number, signal.Signals)]
    return {
        "main": __name__,
        "arguments": sys.argv[1:],
        "command": sys.orig_argv[1:],
        "folder": os.getcwd(),
        "path": [os.path.realpath(entry) for entry in sys.path],
        "environment": dict(os.environ),
        "leads_session": os.getsid(0) == os.getpid(),
        "leads_group": os.getpgid(0) == os.getpid(),
        "handlers": {number.name: str(signal.getsignal(number)) for number in signals},
        "blocked": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])),
        "threads": threading.active_count(),
        "encodings": [sys.stdin.encoding, sys.stdout.encoding, sys.stderr.encoding, sys.stderr.errors],
        "files": sorted(
            file for file in range(64) if os.path.exists(f"/proc/self/fd/{file}") and not is_template(file)
        ),
    }


def is_template(file: int) -> bool:
    """Whether it is the socket to this process's own template; the program opens none."""
    return os.readlink(f"/proc/self/fd/{file}").startswith("socket:")


if __name__ == "__main__":
    found = facts()
    if "worker" in sys.argv:
        sys.stdout.write(json.dumps({"parent": os.getppid(), **found}))
    else:
        worker = json.loads(subprocess.run(WORKER, capture_output=True, text=True, check=True).stdout)
        sys.stdout.write(json.dumps({"own_worker": worker.pop("parent") == os.getpid(), "worker": worker, **found}))
