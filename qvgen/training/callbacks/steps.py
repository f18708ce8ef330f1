"""Callbacks of a run: the method's schedule, the metrics of each step, the progress bar.

Both act between optimizer steps, once per step however many micro-batches it has, and depend on the step's number
alone, so that a resumed run does what the uninterrupted one did.
"""

from __future__ import annotations

import csv
import io
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning
import torch
from tqdm import tqdm

from qvgen.evaluation.metric_rows import read_metric_rows
from qvgen.methods.base import Schedule
from qvgen.run_directory import atomic_write, set_aside
from qvgen.training.module import VideoTraining
from qvgen.training.progress import progress_bar
from qvgen.training.step_figures import FIGURE_COLUMNS, StepFigures
from qvgen.training.student_metrics import STUDENT_COLUMNS, is_looked_at, student_metrics

log = logging.getLogger(__name__)

METRIC_COLUMNS = (
    "step",
    "train/loss",
    "train/gradient_norm",
    "train/gradient_norm_weights",
    "train/gradient_norm_phi",
    "train/learning_rate",
    "train/seconds",
    "phi/rank",
    "phi/gamma_min",
    *STUDENT_COLUMNS,
    *FIGURE_COLUMNS,
    "val/relative_error",
)
"""Columns of metrics.csv. train/gradient_norm is the norm before clipping, of all gradients and of two of the optimizer's
groups apart, train/seconds counts from the run's first step over all its sessions, val/* is held out; numbers of the layers
(:mod:`qvgen.training.student_metrics`) stand at about a hundred steps of a run. system/* is in
:mod:`qvgen.training.step_figures`."""


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
    """One row per optimizer step: to metrics.csv, to the trainer's loggers, to callbacks (``self.log``) and to the bar.

    The row of a step that is measured is written after the measurement. One that a stop has cut short is made when the run
    goes on, and its number comes into the row that is there.

    Args:
        path: metrics.csv; rows that are there from before a resume are kept up to the step that is resumed.
        schedule: The training method's, whose numbers are columns too; None without one.
        num_steps: Optimizer steps of the run.
        figures: What a step reaches; None: its columns are empty.
    """

    def __init__(
        self, path: Path, *, schedule: Schedule | None, num_steps: int, figures: StepFigures | None = None
    ) -> None:
        self.path, self.schedule, self.num_steps, self.figures = path, schedule, num_steps, figures
        self.columns = metric_columns(schedule)
        self._bar: tqdm[Any] | None = None
        self._last_step = 0
        self._started = 0.0
        self._waiting: dict[str, float | int] | None = None

    def on_load_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Learn where the run goes on; the trainer itself is told after on_fit_start."""
        del trainer, pl_module
        self._last_step = int(checkpoint["global_step"])

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Measure what a stop cut short after the last step, where no step is left that Lightning would begin with."""
        assert isinstance(pl_module, VideoTraining)
        if self._last_step != self.num_steps or not pl_module.is_measured(self.num_steps):
            return
        is_missing = trainer.is_global_zero and self._has_no_error(read_metric_rows(self.path)[0])
        if trainer.strategy.broadcast(is_missing):
            pl_module.measure()
            self._add_error(trainer, pl_module)

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

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Begin to measure a step."""
        del trainer, pl_module, batch_idx
        if self.figures is not None:
            self.figures.begin(batch)

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Make the row of an optimizer step that is complete, and write it unless a measurement follows."""
        del outputs, batch, batch_idx
        assert isinstance(pl_module, VideoTraining)
        if trainer.global_step == self._last_step:
            return
        step, self._last_step = self._last_step, trainer.global_step
        loss = trainer.strategy.reduce(torch.stack(pl_module.step_losses).mean(), reduce_op="mean")
        pl_module.step_losses.clear()
        numbers = {"train/loss": loss.float(), **pl_module.norms}
        row: dict[str, float | int] = {
            **dict(zip(numbers, torch.stack(list(numbers.values())).tolist(), strict=True)),
            "train/learning_rate": pl_module.learning_rate,
            "train/seconds": time.monotonic() - self._started,
        }
        if self.figures is not None:  # the device has been waited for: the row's numbers are read
            row.update(self.figures.end())
        if self.schedule is not None:
            row.update(self.schedule.metrics(step))
        if is_looked_at(step, num_steps=self.num_steps):
            row.update(student_metrics(pl_module.student))
        log_for_callbacks(pl_module, row)
        self._waiting = row
        if not pl_module.is_measured(step + 1):
            self._write(trainer)

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Write the row of the step that was measured, or add to it what a stop had left out."""
        assert isinstance(pl_module, VideoTraining)
        assert pl_module.relative_error is not None
        if self._waiting is None:
            self._add_error(trainer, pl_module)
            return
        self._waiting["val/relative_error"] = pl_module.relative_error
        self._write(trainer)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Close the bar."""
        del trainer, pl_module
        self.close()

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        """Write a row whose measurement did not come to its end; close the bar, so that the message has a line of its own."""
        del pl_module, exception
        self._write(trainer)
        self.close()

    def close(self) -> None:
        """Close the progress bar; a second call does nothing."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _has_no_error(self, rows: Sequence[Mapping[str, str]]) -> bool:
        """Whether the last step's row is there without what was to be measured after it."""
        return bool(rows) and int(rows[-1]["step"]) == self._last_step - 1 and not rows[-1].get("val/relative_error")

    def _add_error(self, trainer: lightning.Trainer, pl_module: VideoTraining) -> None:
        """Add what was measured to the last row of the table."""
        rows = read_metric_rows(self.path)[0] if trainer.is_global_zero else []
        if self._has_no_error(rows):
            assert pl_module.relative_error is not None
            rows[-1]["val/relative_error"] = str(pl_module.relative_error)
            write_table(self.path, self.columns, rows)
            # The row of the step before was sent without it.
            log_row(trainer, {"val/relative_error": pl_module.relative_error}, step=self._last_step)

    def _write(self, trainer: lightning.Trainer) -> None:
        """Write the row that waits, as rank 0."""
        row, self._waiting, step = self._waiting, None, self._last_step - 1
        if row is None or not trainer.is_global_zero:
            return
        with self.path.open("a", encoding="utf-8", newline="") as file:
            csv.DictWriter(file, self.columns, lineterminator="\n").writerow({"step": step, **row})
        if self._last_step % trainer.log_every_n_steps == 0 or "val/relative_error" in row:
            log_row(trainer, row, step=step)
        if self._bar is not None:
            shown = {"loss": f"{row['train/loss']:.4f}"}
            if self.schedule is not None:
                shown |= {
                    name.rpartition("/")[2].removesuffix("_min"): f"{row[name]:.3g}" for name in self.schedule.columns
                }
            for name, label in (("system/clips_per_second", "clips/s"), ("system/mfu", "mfu")):
                if name in row:
                    shown[label] = f"{row[name]:.3g}"
            self._bar.set_postfix(shown, refresh=False)
            self._bar.update()


def metric_columns(schedule: Schedule | None) -> tuple[str, ...]:
    """Columns of metrics.csv: those of every run, and those of a method's schedule."""
    further = () if schedule is None else schedule.columns
    return (*METRIC_COLUMNS, *(name for name in further if name not in METRIC_COLUMNS))


def log_for_callbacks(pl_module: lightning.LightningModule, row: Mapping[str, float | int]) -> None:
    """Put a row into ``trainer.callback_metrics``, where callbacks with a ``monitor`` look; in all processes.

    Left out where all callbacks are ours, which look elsewhere: Lightning takes some milliseconds for it in each step.
    """
    if all(type(callback).__module__.startswith("qvgen.") for callback in pl_module.trainer.callbacks):
        return
    values = {name: torch.tensor(float(value)) for name, value in row.items()}  # not a copy to the GPU for each number
    pl_module.log_dict(values, on_step=True, on_epoch=False, logger=False, batch_size=1)


def log_row(trainer: lightning.Trainer, row: Mapping[str, float | int], *, step: int) -> None:
    """Give a row to every logger, at an optimizer step."""
    for logger in trainer.loggers:
        logger.log_metrics(dict(row), step=step)


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
