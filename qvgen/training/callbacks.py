"""Callbacks of a run: the method's schedule, the metrics of each step, the progress bar.

Both act between optimizer steps, once per step however many micro-batches it has, and depend on the step's number
alone, so that a resumed run does what the uninterrupted one did.
"""

from __future__ import annotations

import csv
import io
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning
import torch
from torch import nn
from tqdm import tqdm

from qvgen.evaluation.metric_rows import read_metric_rows
from qvgen.methods.base import Schedule
from qvgen.run_directory import atomic_write, set_aside
from qvgen.stop_request import Stopped
from qvgen.training.module import VideoTraining
from qvgen.training.progress import progress_bar
from qvgen.training.stop_point import interruptible

log = logging.getLogger(__name__)

METRIC_COLUMNS = (
    "step",
    "train/loss",
    "train/gradient_norm",
    "train/learning_rate",
    "train/seconds",
    "phi/rank",
    "phi/gamma_min",
    "val/relative_error",
)
"""Columns of metrics.csv. train/gradient_norm is the norm before clipping, train/seconds
counts from the run's first step over all its sessions, val/* is held out."""


class MethodSchedule(lightning.Callback):
    """Brings the student to the state of each optimizer step before the step.

    Args:
        schedule: The training method's, of the whole run.
    """

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self._applied_step = -1

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Once per optimizer step."""
        del batch, batch_idx
        assert isinstance(pl_module, VideoTraining)
        if trainer.global_step != self._applied_step:
            self._applied_step = trainer.global_step
            self.schedule.apply_(pl_module.student, trainer.optimizers[0], step=trainer.global_step)


class StepMetrics(lightning.Callback):
    """One row per optimizer step: to metrics.csv, to the trainer's loggers and to the progress bar.

    Args:
        path: metrics.csv; rows that are there from before a resume are kept up to the step that is resumed.
        schedule: The training method's, whose numbers are columns too; None without one.
        validate: Measures the held-out relative error of the student; None for never. Rank 0 writes what it found;
            another process has one where the student's forward pass needs all of them.
        every_steps: How often; also after the last step.
        num_steps: Optimizer steps of the run.
        sharded: The student's forward pass needs all processes.
    """

    def __init__(
        self,
        path: Path,
        *,
        schedule: Schedule | None,
        validate: Callable[[nn.Module], float] | None,
        every_steps: int | None,
        num_steps: int,
        sharded: bool = False,
    ) -> None:
        self.path, self.schedule = path, schedule
        further = () if schedule is None else schedule.columns
        self.columns = (*METRIC_COLUMNS, *(name for name in further if name not in METRIC_COLUMNS))
        self.validate, self.every_steps = validate, every_steps
        self.num_steps, self.sharded = num_steps, sharded
        self._bar: tqdm[Any] | None = None
        self._last_step = 0
        self._started = 0.0

    def on_load_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Learn where the run goes on; the trainer itself is told after on_fit_start."""
        del trainer, pl_module
        self._last_step = int(checkpoint["global_step"])

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Measure what a stop cut short; also in a run that has no step left."""
        assert isinstance(pl_module, VideoTraining)
        step = self._last_step
        if self.validate is None or step == 0 or not self._is_validation_step(step):
            return
        rows = (
            [row for row in read_metric_rows(self.path)[0] if int(row["step"]) < step] if trainer.is_global_zero else []
        )
        is_missing = bool(rows) and int(rows[-1]["step"]) == step - 1 and not rows[-1].get("val/relative_error")
        if self.sharded:
            is_missing = bool(trainer.strategy.broadcast(is_missing))
        if not is_missing:
            return
        with interruptible(pl_module.student, together=self.sharded):
            error = self.validate(pl_module.student)
        if trainer.is_global_zero:
            rows[-1]["val/relative_error"] = str(error)
            write_table(self.path, self.columns, rows)
            for logger in trainer.loggers:  # the row of the step before was sent without it
                logger.log_metrics({"val/relative_error": error}, step=step)

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Open the table at the step that the run begins with."""
        del pl_module
        self._last_step = trainer.global_step
        self._started = time.monotonic()
        if trainer.is_global_zero:
            self._started -= begin_table(self.path, self.columns, step=trainer.global_step)
            self._bar = progress_bar(
                desc="train",
                unit="step",
                total=self.num_steps,
                initial=trainer.global_step,
                rank=trainer.global_rank if trainer.world_size > 1 else None,
            )

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Write the row of an optimizer step that is complete."""
        del outputs, batch, batch_idx
        assert isinstance(pl_module, VideoTraining)
        if trainer.global_step == self._last_step:
            return
        step, self._last_step = self._last_step, trainer.global_step
        loss = trainer.strategy.reduce(torch.stack(pl_module.step_losses).mean(), reduce_op="mean")
        pl_module.step_losses.clear()
        error = None
        if self._is_validation_step(step + 1) and self.validate is not None:
            # A stop leaves the row without it: the state is saved next, and measured when the run goes on.
            with suppress(Stopped), interruptible(pl_module.student, together=self.sharded):
                error = self.validate(pl_module.student)
        if trainer.is_global_zero:
            assert pl_module.gradient_norm is not None
            row: dict[str, float | int] = {
                "train/loss": float(loss),
                "train/gradient_norm": float(pl_module.gradient_norm),
                "train/learning_rate": pl_module.learning_rate,
                "train/seconds": time.monotonic() - self._started,
            }
            if self.schedule is not None:
                row.update(self.schedule.metrics(step))
            if error is not None:
                row["val/relative_error"] = error
            self._write(row, step=step, loggers=trainer.loggers)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Close the bar."""
        del trainer, pl_module
        self.close()

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        """Close the bar, so that the message stands on a line of its own."""
        del trainer, pl_module, exception
        self.close()

    def close(self) -> None:
        """Close the progress bar; a second call does nothing."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _is_validation_step(self, done: int) -> bool:
        return self.every_steps is not None and (done % self.every_steps == 0 or done == self.num_steps)

    def _write(self, row: Mapping[str, float | int], *, step: int, loggers: list[Any]) -> None:
        with self.path.open("a", encoding="utf-8", newline="") as file:
            csv.DictWriter(file, self.columns, lineterminator="\n").writerow({"step": step, **row})
        for logger in loggers:
            logger.log_metrics(dict(row), step=step)
        if self._bar is not None:
            shown = {"loss": f"{row['train/loss']:.4f}"}
            if self.schedule is not None:
                shown |= {
                    name.rpartition("/")[2].removesuffix("_min"): f"{row[name]:.3g}" for name in self.schedule.columns
                }
            self._bar.set_postfix(shown, refresh=False)
            self._bar.update()


def begin_table(path: Path, columns: Sequence[str], *, step: int) -> float:
    """Write the table of a session that begins at a step: the rows before it, of these columns.

    A table of which rows had to be left out is kept beside it.

    Returns:
        train/seconds of the last row that was kept; 0 without one.
    """
    rows, damaged = read_metric_rows(path)
    if damaged:
        log.warning("%s: what can't be read is kept in %s", path, set_aside(path).name)
    keep = [row for row in rows if int(row["step"]) < step]
    write_table(path, columns, keep)
    return _seconds(keep)


def write_table(path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, str]]) -> None:
    """Write rows with these columns, whole or not at all; what a row lacks is empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    atomic_write(path, text.getvalue().encode())


def total_seconds(path: Path) -> float:
    """Seconds that the steps in a metrics.csv took, over all sessions of the run."""
    return _seconds(read_metric_rows(path)[0])


def _seconds(rows: Sequence[Mapping[str, str]]) -> float:
    return float(rows[-1].get("train/seconds") or 0.0) if rows else 0.0
