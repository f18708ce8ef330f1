"""What Lightning's loop is asked for by :mod:`qvgen.training.distributed.heartbeat`, which needs neither it nor torch."""

from __future__ import annotations

from typing import Any

import lightning
import torch

from qvgen.training.distributed import heartbeat


class Heartbeat(lightning.Callback):
    """Reports what this process does to whoever watches it (:mod:`qvgen.training.distributed.heartbeat`). Put it first."""

    def __init__(self) -> None:
        self._last_step = 0

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """The forward pass begins."""
        del pl_module, batch, batch_idx
        self._last_step = trainer.global_step
        heartbeat.report(heartbeat.COMPUTING, step=trainer.global_step)

    def on_before_backward(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, loss: torch.Tensor
    ) -> None:
        """The backward pass begins, in which processes wait for each other."""
        del trainer, pl_module, loss
        heartbeat.report(heartbeat.BACKWARD)

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """An optimizer step may be complete."""
        del pl_module, outputs, batch, batch_idx
        if trainer.global_step != self._last_step:
            heartbeat.report(heartbeat.DONE)
