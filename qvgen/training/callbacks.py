"""Callbacks of a run: the decay of Phi, the metrics of each step, the progress bar, checkpoints.

All act between optimizer steps, once per step however many micro-batches it has, and depend on the step's number
alone, so that a resumed run does what the uninterrupted one did.
"""

from __future__ import annotations

import csv
import io
import logging
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from torch import nn
from tqdm import tqdm

from qvgen.layers.swap import quantized_layers
from qvgen.lowrank.decay import DecaySchedule
from qvgen.run_directory import atomic_write
from qvgen.training.module import VideoTraining
from qvgen.training.optim import forget_moments_

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


class PhiDecay(lightning.Callback):
    """Brings every layer's Phi to the schedule's state before each optimizer step, and to nothing at the end.

    Args:
        schedule: The plan of the whole run.
    """

    def __init__(self, schedule: DecaySchedule) -> None:
        self.schedule = schedule
        self._applied_step = -1

    def apply(self, student: nn.Module, optimizer: torch.optim.Optimizer | None, *, step: int) -> None:
        """Advance all layers to optimizer step ``step``; where L and R were rewritten, forget their moments."""
        state = self.schedule.at(step)
        for layer in quantized_layers(student).values():
            if layer.phi is not None and layer.phi.advance_(state) and optimizer is not None:
                forget_moments_(optimizer, layer.phi.left)
                forget_moments_(optimizer, layer.phi.right)

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Once per optimizer step."""
        del batch, batch_idx
        assert isinstance(pl_module, VideoTraining)
        if trainer.global_step != self._applied_step:
            self._applied_step = trainer.global_step
            self.apply(pl_module.student, trainer.optimizers[0], step=trainer.global_step)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Drop what the last step annealed to 0, where there is no tail."""
        assert isinstance(pl_module, VideoTraining)
        self.apply(pl_module.student, trainer.optimizers[0], step=trainer.global_step)


class StepMetrics(lightning.Callback):
    """One row per optimizer step: to metrics.csv, to the trainer's loggers and to the progress bar.

    Args:
        path: metrics.csv; rows that are there from before a resume are kept up to the step that is resumed.
        schedule: The plan of Phi, None without it.
        validate: Measures the held-out relative error of the student; None for never.
        every_steps: How often; also after the last step.
        num_steps: Optimizer steps of the run.
    """

    def __init__(
        self,
        path: Path,
        *,
        schedule: DecaySchedule | None,
        validate: Callable[[nn.Module], float] | None,
        every_steps: int | None,
        num_steps: int,
    ) -> None:
        self.path, self.schedule = path, schedule
        self.validate, self.every_steps = validate, every_steps
        self.num_steps = num_steps
        self._bar: tqdm[Any] | None = None
        self._last_step = 0
        self._started = 0.0

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Open the table at the step that the run begins with."""
        del pl_module
        self._last_step = trainer.global_step
        self._started = time.monotonic()
        if trainer.is_global_zero:
            keep = _rows_before(self.path, trainer.global_step)
            if keep:
                self._started -= float(keep[-1]["train/seconds"])
            text = io.StringIO()
            writer = csv.DictWriter(text, METRIC_COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(keep)
            atomic_write(self.path, text.getvalue().encode())
            self._bar = tqdm(
                total=self.num_steps, initial=trainer.global_step, desc="train", unit="step", dynamic_ncols=True
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
        if trainer.is_global_zero:
            assert pl_module.gradient_norm is not None
            row: dict[str, float | int] = {
                "train/loss": float(loss),
                "train/gradient_norm": float(pl_module.gradient_norm),
                "train/learning_rate": trainer.optimizers[0].param_groups[0]["lr"],
                "train/seconds": time.monotonic() - self._started,
            }
            if self.schedule is not None:
                state = self.schedule.at(step)
                row |= {"phi/rank": state.rank, "phi/gamma_min": min(state.gate, default=0.0)}
            if self._is_validation_step(step + 1) and self.validate is not None:
                row["val/relative_error"] = self.validate(pl_module.student)
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
            csv.DictWriter(file, METRIC_COLUMNS, lineterminator="\n").writerow({"step": step, **row})
        for logger in loggers:
            logger.log_metrics(dict(row), step=step)
        if self._bar is not None:
            shown = {"loss": f"{row['train/loss']:.4f}"}
            if self.schedule is not None:
                shown |= {"rank": str(row["phi/rank"]), "gamma": f"{row['phi/gamma_min']:.2f}"}
            self._bar.set_postfix(shown, refresh=False)
            self._bar.update()


def _rows_before(path: Path, step: int) -> list[dict[str, str]]:
    """Rows of a table that are older than a step; a line that a killed process left half written is dropped."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if None not in row.values() and (row["step"] or "").isdigit()]
    return [row for row in rows if int(row["step"]) < step]


def total_seconds(path: Path) -> float:
    """Seconds that the steps in a metrics.csv took, over all sessions of the run."""
    rows = _rows_before(path, sys.maxsize)
    return float(rows[-1]["train/seconds"]) if rows else 0.0


class StepCheckpoint(lightning.Callback):
    """Saves the whole training state every so many optimizer steps and keeps the newest few.

    Args:
        directory: Where ``step-00000050.ckpt`` go.
        every_steps: Optimizer steps between two of them; the last step has one too.
        keep: How many are kept.
        num_steps: Optimizer steps of the run.
    """

    def __init__(self, directory: Path, *, every_steps: int, keep: int, num_steps: int) -> None:
        self.directory, self.every_steps, self.keep, self.num_steps = directory, every_steps, keep, num_steps
        self._saved_step = 0

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """The state that was resumed from is saved already."""
        del pl_module
        self._saved_step = trainer.global_step

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Save after a step that is due; then remove the oldest."""
        del pl_module, outputs, batch, batch_idx
        step = trainer.global_step
        if step == self._saved_step or (step % self.every_steps and step != self.num_steps):
            return
        self._saved_step = step
        trainer.save_checkpoint(self.directory / f"step-{step:08d}.ckpt")
        if trainer.is_global_zero:
            for old in checkpoints(self.directory)[: -self.keep]:
                old.unlink()


def checkpoints(directory: Path) -> list[Path]:
    """Checkpoints of a run, oldest first."""
    return sorted(directory.glob("step-*.ckpt"))


class AtomicCheckpointIO(CheckpointIO):
    """Checkpoints that are whole or not there, and that are read without executing anything they hold."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write beside, force to the disk, rename."""
        del storage_options
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        atomic_write(Path(path), lambda temporary: torch.save(checkpoint, temporary))

    def load_checkpoint(
        self, path: Any, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read tensors and plain values only."""
        del weights_only
        try:
            state: dict[str, Any] = torch.load(path, map_location=map_location or "cpu", weights_only=True)
        except (RuntimeError, EOFError, ValueError) as error:
            raise ValueError(f"{path} is no checkpoint or damaged; delete it to resume from the one before") from error
        return state

    def remove_checkpoint(self, path: Any) -> None:
        """Delete one."""
        Path(path).unlink(missing_ok=True)
