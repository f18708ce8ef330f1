"""A program whose wandb process is killed while it logs; run by test_wandb_run.py as `wandb_killed.py RUN_DIR`."""

import logging
import os
import signal
import sys
import time
from pathlib import Path

from qvgen.training.wandb_run import training_log
from tests.runs import train_config


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


def main() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    run_dir = Path(sys.argv[1])
    with training_log(train_config("logger=wandb"), run_dir) as loggers:
        loggers[0].log_metrics({"train/loss": 1.0}, step=0)
        (service,) = children()
        os.kill(service, signal.SIGKILL)
        deadline = time.monotonic() + 60
        step = 1
        while loggers[0]._run is not None and time.monotonic() < deadline:
            loggers[0].log_metrics({"train/loss": 1.0}, step=step)
            step += 1
            time.sleep(0.01)
        (run_dir / "report.json").write_text('{"a": 1}')
    (run_dir / "done").touch()


if __name__ == "__main__":
    main()
