"""SLURM's srun, for a batch script on one machine without SLURM: the tasks of a step, their variables, signals and codes.

    python srun_program.py [options of srun] COMMAND...

It starts SLURM_NTASKS tasks, all on this machine, with the variables that srun sets; ends the others where one fails and
``--kill-on-bad-exit`` is set; passes SIGUSR1 on to all, as ``--signal=USR1@...`` makes SLURM do; and ends with the largest
exit code.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from typing import Any


def main(words: list[str]) -> int:
    """Run a step; its exit code."""
    ends_others = "--kill-on-bad-exit=1" in words
    command = words[next(place for place, word in enumerate(words) if not word.startswith("--")) :]
    count = int(os.environ["SLURM_NTASKS"])
    tasks = [subprocess.Popen(command, env={**os.environ, **variables(rank, count)}) for rank in range(count)]

    def pass_on(number: int, _: Any) -> None:
        for task in tasks:
            task.send_signal(number)

    signal.signal(signal.SIGUSR1, pass_on)
    while any(task.poll() is None for task in tasks):
        if ends_others and any(task.poll() for task in tasks):
            pass_on(signal.SIGTERM, None)
        time.sleep(0.05)
    return max(task.returncode if task.returncode >= 0 else 128 - task.returncode for task in tasks)


def variables(rank: int, count: int) -> dict[str, str]:
    """Of a task."""
    return {
        "SLURM_STEP_ID": "0", "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "SLURM_NODEID": "0",
        "SLURM_STEP_NUM_TASKS": str(count), "SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_NODELIST": "localhost",
        "SLURM_STEP_TASKS_PER_NODE": str(count),
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
