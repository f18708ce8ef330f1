"""A program whose files can't grow while wandb logs, as on a full disk, and whose wandb process is killed then.

Run by test_wandb_run.py as `python -m tests.training.tracking.wandb_faults FOLDER`; the two trainings lie in FOLDER/full and
FOLDER/killed.
"""

import logging
import os
import resource
import signal
import sys
import time
from pathlib import Path

from qvgen.verbs._parts import open_log
from tests.runs import train_config

LARGEST_FILE_BYTES = 20_000
STEPS = 500


def children() -> list[int]:
    """Processes that this one started."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            if parent == os.getpid():
                found.append(int(entry.name))
    return found


def full(run_dir: Path) -> None:
    with open_log(train_config("logger=wandb"), run_dir) as loggers:
        for step in range(STEPS):
            loggers[0].log_metrics({"train/loss": float(step)}, step=step)
        (run_dir / ("whole" if loggers[0]._run is not None else "ended")).touch()


def killed(run_dir: Path, *, others: list[int]) -> None:
    with open_log(train_config("logger=wandb"), run_dir) as loggers:
        loggers[0].log_metrics({"train/loss": 1.0}, step=0)
        (service,) = set(children()) - set(others)
        os.kill(service, signal.SIGKILL)
        deadline = time.monotonic() + 60
        step = 1
        while loggers[0]._run is not None and time.monotonic() < deadline:
            loggers[0].log_metrics({"train/loss": 1.0}, step=step)
            step += 1
            time.sleep(0.01)
        (run_dir / "report.json").write_text('{"a": 1}')
    (run_dir / "done").touch()


def main() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    folder = Path(sys.argv[1])
    for name in ("full", "killed"):
        (folder / name).mkdir()
    resource.setrlimit(resource.RLIMIT_FSIZE, (LARGEST_FILE_BYTES, LARGEST_FILE_BYTES))  # wandb's process inherits it
    others = children()
    full(folder / "full")
    killed(folder / "killed", others=others)


if __name__ == "__main__":
    main()
