"""Checkpoints of a training run: when they are written, which are kept, and that each is whole and harmless to read."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import lightning
import torch
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO

from qvgen import stop_request
from qvgen.config.schema.sections import CheckpointConfig
from qvgen.run_directory import atomic_write
from qvgen.training.checkpoint.background_save import BackgroundSave
from qvgen.training.checkpoint.folder_reader import CheckpointFolder
from qvgen.training.checkpoint.replaced_folder import put_in_place, remove
from qvgen.training.checkpoint.saved_tensor import whole_values
from qvgen.training.design.micro_batch import count_micro_batches_
from qvgen.training.distributed import heartbeat
from qvgen.training.distributed.writes_folders import IN_BACKGROUND, WritesFolders
from qvgen.training.optimizer_module import OptimizerModule, TrainingDivergedError
from qvgen.training.stop_point import agreed

PATIENCE_SECONDS = 60.0
"""How long a process that ends by an error of its own waits until a checkpoint is there that all are writing."""


class CheckpointWriter(lightning.Callback):
    """Saves the whole training state every so many optimizer steps or minutes, keeps the newest few, and stops on request.

    A sharded model's state is copied, and written while training goes on: the next one, a stop, an error and the end of
    training wait for it, it counts as saved once it is there, and what kept it from being written ends training behind the
    step in which that is known.

    A state is good once the step after it had a finite loss: older ones are removed only then, and a state from which
    training diverged at once is removed itself.

    After a signal (:mod:`qvgen.stop_request`) all processes save and stop after the same step: each says in a collective
    behind every step whether it was asked to. Put the callback behind the one that writes the step's row.

    Args:
        directory: Where ``step-00000050.ckpt`` go: files, or folders where a model is sharded.
        config: How often, and how many are kept.
        num_steps: Optimizer steps of the run; the last one is saved.
        before: Also saved after steps for which it is True: something long follows, which one process may have to leave
            while the others compute the next step.
    """

    def __init__(
        self,
        directory: Path,
        *,
        config: CheckpointConfig,
        num_steps: int,
        before: Callable[[int], bool] = lambda step: False,  # noqa: ARG005
    ) -> None:
        self.directory, self.config, self.num_steps, self.before = directory, config, num_steps, before
        self._last_step = self._saved_step = 0
        self._said_step = 0
        self._saved_at = 0.0

    def on_load_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Count the steps that are done in the micro-batches that a step has now."""
        del pl_module
        count_micro_batches_(checkpoint, per_step=trainer.accumulate_grad_batches)

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Count the present state as saved, since the run came from a checkpoint of it; signals now wait for a step's end."""
        del pl_module
        self._last_step = self._saved_step = self._said_step = trainer.global_step
        self._saved_at = time.monotonic()
        self._note()
        stop_request.postpone(True)

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Remove what is no longer needed; save after a step that is due, or the last one before a stop.

        Raises:
            Stopped: In all processes, after the step that any of them was asked to stop in.
        """
        del outputs, batch, batch_idx
        if trainer.global_step == self._last_step:
            return
        self._last_step = trainer.global_step
        self._remove_old(trainer)
        assert isinstance(pl_module, OptimizerModule)
        if not pl_module.is_measured(self._last_step):
            self._finish_step(trainer)

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Save after the measurement of a step, so that callbacks have seen what a resumed run does not measure again."""
        del pl_module
        if self._last_step > 0:
            self._finish_step(trainer)

    def _finish_step(self, trainer: lightning.Trainer) -> None:
        step, saving = self._last_step, _saving(trainer)
        is_stop, is_time, has_failed = agreed(
            stop_request.is_requested(),
            self._is_time(trainer),
            saving is not None and saving.has_failed,
            together=trainer.world_size > 1,
        )
        if has_failed:
            self._wait(trainer)
        self._note(trainer)
        is_due = (
            step % self.config.every_steps == 0 or step == self.num_steps or trainer.should_stop or self.before(step)
        )
        if is_stop or is_time or is_due:
            self._save(trainer)
        if is_stop:
            self._wait(trainer)
            raise stop_request.Stopped

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Nothing comes after the last state that could fail, once it is there."""
        del pl_module
        self._wait(trainer)
        self._remove_old(trainer)
        stop_request.postpone(False)

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        """Save a step that is complete, where a stop cut short what followed it; remove what training diverged from.

        The state that training diverged from stays if it is the only one.
        """
        del pl_module
        is_common = isinstance(exception, stop_request.Stopped | TrainingDivergedError)
        if isinstance(exception, stop_request.Stopped) and self._last_step > self._saved_step:
            self._save(trainer)
        # An error of one process alone: the others may be gone, and whoever waits for them would wait in vain.
        try:
            self._wait(trainer, timeout_s=None if is_common else PATIENCE_SECONDS, is_failing=not is_common)
        finally:
            stop_request.postpone(False)
        if isinstance(exception, TrainingDivergedError) and trainer.is_global_zero:
            found = checkpoints(self.directory)
            if len(found) > 1 and found[-1] == self._path(trainer.global_step):
                remove(found[-1])

    def _is_time(self, trainer: lightning.Trainer) -> bool:
        """Whether rank 0's clock asks for a checkpoint; the others follow it."""
        every = self.config.every_minutes
        return trainer.is_global_zero and every is not None and time.monotonic() - self._saved_at >= 60 * every

    def _save(self, trainer: lightning.Trainer) -> None:
        self._wait(trainer)  # for the one before
        heartbeat.report(heartbeat.SAVING)
        trainer.save_checkpoint(self._path(self._last_step), storage_options=IN_BACKGROUND)
        self._saved_step, self._saved_at = self._last_step, time.monotonic()
        self._note(trainer)

    def _wait(self, trainer: lightning.Trainer, *, timeout_s: float | None = None, is_failing: bool = False) -> None:
        """Wait until the checkpoint that is being written is there; an error of it is raised unless there is another."""
        if (saving := _saving(trainer)) is None:
            return
        heartbeat.report(heartbeat.SAVING)
        with suppress(Exception) if is_failing else nullcontext():
            saving.wait(timeout_s)
        self._note(trainer)

    def _note(self, trainer: lightning.Trainer | None = None) -> None:
        """Say which step is saved."""
        saving = None if trainer is None else _saving(trainer)
        if saving is None or (saving.is_done and not saving.has_failed):
            self._said_step = self._saved_step
        step = self._said_step
        stop_request.note(f"after step {step}, saved" if step else "before the first step was done")

    def _path(self, step: int) -> Path:
        return self.directory / f"step-{step:08d}.ckpt"

    def _remove_old(self, trainer: lightning.Trainer) -> None:
        if trainer.is_global_zero:
            for old in checkpoints(self.directory)[: -self.config.keep]:
                remove(old)


def _saving(trainer: lightning.Trainer) -> BackgroundSave | None:
    """The checkpoint that a thread writes or has written."""
    return trainer.strategy.saving if isinstance(trainer.strategy, WritesFolders) else None


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
        if Path(path).is_dir():  # of the same step, written by other processes
            whole = Path(path).with_name(f".{Path(path).name}.file.tmp")
            atomic_write(whole, lambda temporary: _save(checkpoint, temporary))
            put_in_place(whole, Path(path))
            return
        atomic_write(Path(path), lambda temporary: _save(checkpoint, temporary))

    def load_checkpoint(
        self, path: Any, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read tensors and plain values only; mapped, tensors of a folder are :class:`SavedTensor`."""
        del weights_only
        state: dict[str, Any]
        if Path(path).is_dir():
            state = CheckpointFolder(Path(path)).state
            return state if self.mapped else whole_values(state)
        try:
            state = torch.load(path, map_location=map_location or "cpu", weights_only=True, mmap=self.mapped)
        except (RuntimeError, EOFError, ValueError, UnpicklingError) as error:
            raise ValueError(f"{path} is no checkpoint or damaged; delete it to resume from the one before") from error
        return state

    def remove_checkpoint(self, path: Any) -> None:
        """Delete one."""
        remove(Path(path))


def _save(checkpoint: dict[str, Any], path: Path) -> None:
    """torch.save through a Python file, which says why it can't be written; torch's own says where it noticed."""
    with path.open("wb") as file:
        try:
            torch.save(checkpoint, file)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise
