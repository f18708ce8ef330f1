"""Checkpoints of a training run: when they are written, which are kept, and that each is whole and harmless to read."""

from __future__ import annotations

from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import lightning
import torch
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO

from qvgen.run_directory import atomic_write
from qvgen.training.step_module import TrainingDivergedError


class StepCheckpoint(lightning.Callback):
    """Saves the whole training state every so many optimizer steps and keeps the newest few.

    A state is good once the step after it had a finite loss: older ones are removed only then, and a state from which
    training diverged at once is removed itself.

    Args:
        directory: Where ``step-00000050.ckpt`` go.
        every_steps: Optimizer steps between two of them; the last step has one too.
        keep: How many are kept.
        num_steps: Optimizer steps of the run.
    """

    def __init__(self, directory: Path, *, every_steps: int, keep: int, num_steps: int) -> None:
        self.directory, self.every_steps, self.keep, self.num_steps = directory, every_steps, keep, num_steps
        self._last_step = 0

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """The state that was resumed from is saved already."""
        del pl_module
        self._last_step = trainer.global_step

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Remove what is no longer needed; save after a step that is due."""
        del pl_module, outputs, batch, batch_idx
        step = trainer.global_step
        if step == self._last_step:
            return
        self._last_step = step
        self._remove_old(trainer)
        if step % self.every_steps == 0 or step == self.num_steps:
            trainer.save_checkpoint(self._path(step))

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Nothing comes after the last state that could fail."""
        del pl_module
        self._remove_old(trainer)

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        """Remove the state that training diverged from, unless it is the only one."""
        del pl_module
        if isinstance(exception, TrainingDivergedError) and trainer.is_global_zero:
            found = checkpoints(self.directory)
            if len(found) > 1 and found[-1] == self._path(trainer.global_step):
                found[-1].unlink()

    def _path(self, step: int) -> Path:
        return self.directory / f"step-{step:08d}.ckpt"

    def _remove_old(self, trainer: lightning.Trainer) -> None:
        if trainer.is_global_zero:
            for old in checkpoints(self.directory)[: -self.keep]:
                old.unlink()


def checkpoints(directory: Path) -> list[Path]:
    """Checkpoints of a run, oldest first."""
    return sorted(directory.glob("step-*.ckpt"))


class AtomicCheckpointIO(CheckpointIO):
    """Checkpoints that are whole or not there, and that are read without executing anything they hold.

    Args:
        mapped: Map a file to memory in place of reading it: many processes read the parts that they need.
    """

    def __init__(self, *, mapped: bool = False) -> None:
        self.mapped = mapped

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write beside, force to the disk, rename."""
        del storage_options
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        atomic_write(Path(path), lambda temporary: _save(checkpoint, temporary))

    def load_checkpoint(
        self, path: Any, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read tensors and plain values only."""
        del weights_only
        try:
            state: dict[str, Any] = torch.load(
                path, map_location=map_location or "cpu", weights_only=True, mmap=self.mapped
            )
        except (RuntimeError, EOFError, ValueError, UnpicklingError) as error:
            raise ValueError(f"{path} is no checkpoint or damaged; delete it to resume from the one before") from error
        return state

    def remove_checkpoint(self, path: Any) -> None:
        """Delete one."""
        Path(path).unlink(missing_ok=True)


def _save(checkpoint: dict[str, Any], path: Path) -> None:
    """torch.save through a Python file, which says why it can't be written; torch's own says where it noticed."""
    with path.open("wb") as file:
        try:
            torch.save(checkpoint, file)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise
