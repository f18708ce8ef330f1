"""What holds for the callbacks that a user adds to a run: when they can end it, and what their state may be.

    step            0 ............ first_step ............ num_steps
    asked to end    it goes on     it ends here: the model can be folded, and the report says the steps

Before ``first_step`` the helper Phi still has rank, and a model with it can't be folded, unless Phi is kept. A request to end
(``trainer.should_stop``, as EarlyStopping makes it) is dropped with a warning then; a callback that still wants it asks again
later. That the run has ended is in its last checkpoint: resumed there, it does not go on.

Put :class:`CallbackRules` behind the user's callbacks and before CheckpointWriter.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Sequence
from pickle import PicklingError, UnpicklingError
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import EarlyStopping

from qvgen.errors import UserError, did_you_mean, one_line
from qvgen.methods.base import Schedule
from qvgen.training.stop_point import agreed

log = logging.getLogger(__name__)

ENDED_KEY = "qvgen_ended"
"""Entry of a checkpoint of a run that a callback has ended."""


class CallbackRules(lightning.Callback):
    """Drops requests to end a run that can't end yet, and keeps those that count.

    Args:
        callbacks: The user's.
        first_step: Optimizer steps after which the run can end; see :func:`first_end`.
    """

    def __init__(self, callbacks: Sequence[lightning.Callback], *, first_step: int) -> None:
        self.callbacks, self.first_step = tuple(callbacks), first_step
        self._is_said = self._is_asked = False
        self._last_step = 0

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Raise UserError where a callback's state could not be read again: before the first step, not after the last."""
        del pl_module
        self._last_step = trainer.global_step
        for callback in self.callbacks:
            check_state(type(callback).__name__, callback.state_dict())

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Look at a request that was made after a step."""
        del pl_module, outputs, batch, batch_idx
        if not self.callbacks:
            return
        self._is_asked = self._is_asked or trainer.should_stop
        is_complete, self._last_step = trainer.global_step != self._last_step, trainer.global_step
        trainer.should_stop = False  # between micro-batches a run never ends
        if is_complete:
            (trainer.should_stop,) = agreed(self._is_asked, together=trainer.world_size > 1)
            self._is_asked = False
            self._look(trainer)

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Look at a request that was made after a measurement."""
        del pl_module
        self._look(trainer)

    def on_save_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Note that the run has ended; raise UserError where a callback's state could not be read again."""
        del pl_module
        for name, state in checkpoint.get("callbacks", {}).items():
            check_state(name, state)
        if trainer.should_stop:
            checkpoint[ENDED_KEY] = True

    def on_load_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Stay at the end of a run that has ended."""
        del pl_module
        trainer.should_stop = bool(checkpoint.get(ENDED_KEY))

    def _look(self, trainer: lightning.Trainer) -> None:
        step = trainer.global_step
        if not trainer.should_stop:
            return
        if step < self.first_step:
            trainer.should_stop = False
            if not self._is_said:
                log.warning(
                    "step %d: a callback asked to end the training; it goes on: before step %d the model can't be folded, "
                    "because Phi has rank, or trainer.min_steps says so",
                    step, self.first_step,
                )  # fmt: skip
                self._is_said = True
            return
        log.info("step %d: ended by a callback", step)


def first_end(schedule: Schedule | None, *, num_steps: int, min_steps: int | None, phi_keep: bool = False) -> int:
    """Optimizer steps after which a run can end: Phi is gone or may stay, and ``trainer.min_steps`` are done.

    Args:
        schedule: The method's.
        num_steps: Optimizer steps of the whole run.
        min_steps: ``trainer.min_steps``.
        phi_keep: Whether a model whose Phi has rank can be folded.
    """
    phases = () if schedule is None or phi_keep else schedule.phases
    gone = [first for rank, first in phases if rank == 0]
    without_phi = (gone[0] if gone else num_steps) if phases else 0
    return max(without_phi, min_steps or 0)


def check_monitors(callbacks: Sequence[lightning.Callback], *, columns: Sequence[str], is_measured: bool) -> None:
    """Raise UserError where a callback waits for a number that no run of this kind has.

    Args:
        callbacks: The user's.
        columns: Names of the numbers that the run logs.
        is_measured: Whether the run is measured between its steps.
    """
    others = [callback for callback in callbacks if not type(callback).__module__.startswith("lightning.")]
    for callback in callbacks:
        if not isinstance(callback, EarlyStopping):
            continue
        if not is_measured:
            raise UserError(
                f"{type(callback).__name__} looks at {callback.monitor} after each measurement, and the run has none before "
                "its end; write for example evaluation.every_steps=100"
            )
        if callback.monitor not in columns and not others:  # which may log what they like
            raise UserError(
                f"{type(callback).__name__} monitors {callback.monitor}, which the run does not log"
                f"{did_you_mean(callback.monitor, columns)} (there are: {', '.join(columns)})"
            )


def check_state(name: str, state: object) -> None:
    """Raise UserError unless a checkpoint with a callback's state can be read again without running code.

    Args:
        name: The callback's.
        state: What its ``state_dict()`` gave.
    """
    file = io.BytesIO()
    try:
        torch.save(state, file)
        file.seek(0)
        torch.load(file, weights_only=True)
    except (UnpicklingError, PicklingError, TypeError, AttributeError, RuntimeError) as error:
        raise UserError(
            f"{name}.state_dict() holds what can't be read again without running code; keep tensors, numbers, texts, lists "
            f"and dicts there ({one_line(error):.120})"
        ) from error
