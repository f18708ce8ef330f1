"""One training is one run at Weights & Biases, over all its sessions; and it never costs the training anything.

    run_dir/wandb_run.json   id, name and group: every session continues this run
    run_dir/wandb/           what is sent, or would be: `wandb sync` sends it later

Where there is a key, the server is asked for it before the work begins. A server that can't be reached or refuses the key
makes the run an offline one, with a warning; whatever wandb raises later ends its logging, with a warning, and nothing else.
A disk that is full it does not mention: whether its folder can be written is tried from time to time.

A row of the history has the number of its optimizer step. After a kill, steps that are computed again have the same values;
wandb keeps the ones that it has. Offline sessions lie in folders of their own with one id and steps that go on.
"""

from __future__ import annotations

import json
import logging
import secrets
import string
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger

from qvgen.config.schema.sections import LoggerConfig
from qvgen.run_directory import atomic_write
from qvgen.training.run_label import RECORD_FILE, RunLabel, logged_as
from qvgen.training.tracking.layer_panels import log_layer_pictures, log_layer_table
from qvgen.training.tracking.report_panels import Uploaded, log_report
from qvgen.training.tracking.sections import define_sections, panel_row
from qvgen.training.tracking.service import PROBE_SECONDS, first_line, wandb_problem

log = logging.getLogger(__name__)

INIT_SECONDS, FINISH_SECONDS = 30.0, 60.0
"""How long wandb may take to begin, and to send what is left at the end; the rest stays on the disk."""

DISK_SECONDS, DISK_BYTES = 60.0, 2**16
"""How often it is tried whether wandb's folder can be written, and how much is written and deleted for it."""

_ID_LETTERS = string.ascii_lowercase + string.digits


class WandbRun(Logger):
    """The run that is open in this session.

    Args:
        run: wandb's own object.
    """

    def __init__(self, run: Any) -> None:
        super().__init__()
        self._run: Any | None = run
        self._id = str(run.id)
        self._disk_checked, self._is_full = time.monotonic(), False

    @property
    def name(self) -> str:
        """Of the service."""
        return "wandb"

    @property
    def version(self) -> str:
        """The run's id."""
        return self._id

    def attempt(self, action: Callable[[Any], object]) -> None:
        """Do something with wandb's run; where that fails, warn and leave wandb alone from now on."""
        if self._run is None:
            return
        try:
            action(self._run)
        except Exception as error:  # the border to a service: nothing that it raises is worth a training
            log.warning("wandb failed, training goes on without it (%s: %s)", type(error).__name__, first_line(error))
            self._run = None
            _leave_service()

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Nothing: the configuration was given when the run was opened."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """One row of the history, at an optimizer step."""
        row = panel_row(metrics, step=step)
        self.attempt(lambda run: run.log(row, step=step))
        if time.monotonic() - self._disk_checked > DISK_SECONDS:
            self.attempt(self._check_disk)

    def log_layers(self, rows: Sequence[Mapping[str, Any]], *, step: int) -> None:
        """The numbers of all layers at an optimizer step."""
        self.attempt(lambda run: log_layer_table(run, rows, step=step))

    def log_result(self, run_dir: Path, *, upload: Uploaded) -> None:
        """What a finished run left in its folder; see :mod:`qvgen.training.tracking.report_panels`."""
        self.attempt(lambda run: log_layer_pictures(run, run_dir))
        self.attempt(lambda run: log_report(run, run_dir, upload=upload))

    def finish(self) -> None:
        """End this session's part of the run; a second call does nothing."""
        self.attempt(self._check_disk)
        self.attempt(lambda run: run.finish())
        self._run = None

    def _check_disk(self, run: Any) -> None:
        """Warn once where wandb's folder can't be written: its process drops rows then, and says nothing."""
        self._disk_checked = time.monotonic()
        if self._is_full or (folder := getattr(run, "dir", None)) is None:
            return
        try:
            with tempfile.TemporaryFile(dir=folder) as file:
                file.write(bytes(DISK_BYTES))
        except OSError as error:
            self._is_full = True
            log.warning(
                "wandb can't write to %s (%s): rows are missing there; training goes on, and metrics.csv has all of them",
                folder, error.strerror,
            )  # fmt: skip


def _leave_service() -> None:
    """Have wandb forget its process: it would end ours with a traceback; a later run of this process gets another one."""
    import wandb

    def leave() -> None:
        with suppress(Exception):  # it is said already
            wandb.teardown()

    thread = threading.Thread(target=leave, name="leave_wandb", daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS)


@contextmanager
def training_log(logger: LoggerConfig, run_dir: Path, label: RunLabel) -> Iterator[list[Logger]]:
    """The loggers of a training besides metrics.csv, while a block trains, packs and reports."""
    further = list(logger.further)
    run = open_run(logger, run_dir, label) if logger.name == "wandb" else None
    if run is None:
        yield further
        return
    try:
        yield [run, *further]
        if (run_dir / "report.json").is_file():
            run.log_result(run_dir, upload=logger.upload)
    finally:
        run.finish()


def open_run(logger: LoggerConfig, run_dir: Path, label: RunLabel) -> WandbRun | None:
    """Begin or continue the run of a folder; offline where it can't be online, None where it can't be at all."""
    mode = logger.mode
    if mode == "online" and wandb_problem() is not None:
        mode = "offline"
    modes = [mode, "offline"] if mode == "online" else [mode]
    for mode in modes:
        try:
            run = WandbRun(_begin(logger, run_dir, label, mode=mode))
        except Exception as error:  # see WandbRun.attempt
            log.warning("wandb (%s) does not begin: %s", mode, first_line(error))
        else:
            run.attempt(
                lambda run, mode=mode: log.info("wandb (%s): %s", mode, run.url if mode == "online" else run.dir)
            )
            return run
    return None


def _begin(logger: LoggerConfig, run_dir: Path, label: RunLabel, *, mode: str) -> Any:
    import wandb  # takes seconds, and logger=csv does without

    record = _record(logger, run_dir, label)
    settings = wandb.Settings(
        silent=True,  # one line of our own in place of its banner
        console="off",
        init_timeout=INIT_SECONDS,
        finish_timeout=FINISH_SECONDS,
    )
    run = wandb.init(
        project=logger.project,
        id=record["id"],
        name=record["name"],
        group=record["group"],
        tags=list(dict.fromkeys([*label.tags, *logger.tags])),
        job_type=label.job_type,
        dir=run_dir,
        mode=mode,  # type: ignore[arg-type] # WANDB_MODE's values
        resume="allow",
        settings=settings,
        reinit="create_new",
    )
    run.config.update(dict(label.settings), allow_val_change=True)
    define_sections(run)
    return run


def _record(logger: LoggerConfig, run_dir: Path, label: RunLabel) -> dict[str, Any]:
    """The training's id, name and group: those of its first session."""
    path = run_dir / RECORD_FILE
    try:
        return logged_as(run_dir)
    except FileNotFoundError:
        pass
    except (OSError, ValueError):
        log.warning("%s is damaged; wandb gets a new run", path)
    record = {
        "id": "".join(secrets.choice(_ID_LETTERS) for _ in range(8)),
        "name": f"{label.name} {run_dir.name}",
        "group": logger.group,
    }
    atomic_write(path, json.dumps(record).encode())
    return record
