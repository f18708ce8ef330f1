"""An exponential moving average of the student over its steps (``ema.decay``), in float32.

    after the first step of a phase      average <- student
    after its n-th further step          average <- d average + (1 - d) student      d = min(decay, (1 + n) / (10 + n))

All that is trained is averaged: master weights, scales, zero points, clips, biases, norms, and the factors of Phi. Where
Phi's rank falls, L and R are decomposed anew and the weights have to carry more, so the average begins again with that phase:
at the end it is one of the steps without Phi (``phi.tail_share``), or of those with the rank that stays. It is a function of
the steps' numbers and the weights alone, so a run that goes on has the same bits.

Each process averages its own share of a sharded student. In a checkpoint it stands under ``average``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import lightning
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from qvgen.config.schema.ema import EmaConfig
from qvgen.training.distributed.sharding import share_of
from qvgen.training.distributed.written_rows import written_rows
from qvgen.training.module import VideoTraining
from qvgen.training.optim.host_stream import to_host
from qvgen.training.optim.streamed_adamw import local

AVERAGE_KEY = "average"
"""Entry of a checkpoint: name of each trained tensor of the student -> its average, float32."""


def kept_share(number: int, *, decay: float) -> float:
    """Share of itself that the average keeps in the step of this number of its phase.

    Example:
        >>> [kept_share(number, decay=0.5) for number in (0, 1, 7, 8, 1000)]
        [0.0, 0.18181818181818182, 0.47058823529411764, 0.5, 0.5]
    """
    return min(decay, (1 + number) / (10 + number)) if number else 0.0


class Average(lightning.Callback):
    """Keeps the average of a student while it is trained; put it before all that looks at the student.

    Args:
        config: Its decay and place.
        begins: Optimizer steps with which a phase of Phi begins, rising; the average begins again with each.

    Attributes:
        tensors: The average, float32: name of each trained tensor of the student -> this process's share.
    """

    def __init__(self, config: EmaConfig, *, begins: Sequence[int]) -> None:
        assert config.decay is not None, "there is no average to keep"
        self.config, self.decay, self.begins = config, config.decay, tuple(begins)
        self.tensors: dict[str, Tensor] = {}
        self._saved: Mapping[str, Any] | None = None
        self._last_step = 0

    def on_load_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Find the average of a run that goes on."""
        del trainer, pl_module
        self._saved, self._last_step = checkpoint.get(AVERAGE_KEY), int(checkpoint["global_step"])

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Begin with the student as it is, or with what a checkpoint holds; let measurements see it."""
        del trainer
        assert isinstance(pl_module, VideoTraining)
        self.begin(pl_module.student)
        if self.config.fold:
            pl_module.averaged = self.shown

    def begin(self, student: nn.Module) -> None:
        """Take the student as it is for its average, or what a checkpoint held."""
        for name, parameter in _trained(student):
            value = parameter.detach() if self._saved is None else self._saved[name]
            if isinstance(parameter, DTensor) and not isinstance(value, DTensor):
                value = share_of(value, like=parameter)
            self.tensors[name] = self._home(local(value), local(parameter).device)
        self._saved = None

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Take in a step that is complete."""
        del outputs, batch, batch_idx
        if trainer.global_step == self._last_step:
            return
        self._last_step = trainer.global_step
        assert isinstance(pl_module, VideoTraining)
        self.take_in(pl_module.student, step=self._last_step - 1)

    @torch.no_grad()
    def take_in(self, student: nn.Module, *, step: int) -> None:
        """Average what an optimizer step has left; the first step is 0."""
        begun = max((begin for begin in self.begins if begin <= step), default=0)
        kept = kept_share(step - begun, decay=self.decay)
        for name, parameter in _trained(student):
            average = self.tensors[name]
            average.lerp_(local(parameter).detach().to(average.device, torch.float32), 1.0 - kept)

    def on_save_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add the average: rank 0 all of it, or each process its rows where the student is sharded."""
        assert isinstance(pl_module, VideoTraining)
        found: dict[str, Any] = {}
        for name, parameter in _trained(pl_module.student):
            value = self.tensors[name]
            if isinstance(parameter, DTensor):
                found[name] = written_rows(value, like=parameter)
            elif trainer.is_global_zero:
                found[name] = value.cpu()
        checkpoint[AVERAGE_KEY] = found

    @contextmanager
    def shown(self, student: nn.Module) -> Iterator[None]:
        """Have the student's tensors hold the average inside; what they held waits in the host's memory."""
        kept = {name: to_host(local(parameter).detach(), is_pinned=False) for name, parameter in _trained(student)}
        self.write_(student)
        try:
            yield
        finally:
            with torch.no_grad():
                for name, parameter in _trained(student):
                    local(parameter).copy_(kept[name])

    @torch.no_grad()
    def write_(self, student: nn.Module) -> None:
        """Set the student's tensors to the average, rounded to their type."""
        for name, parameter in _trained(student):
            local(parameter).copy_(self.tensors[name])

    def _home(self, value: Tensor, device: torch.device) -> Tensor:
        value = value.float()
        if self.config.host:
            return to_host(value, is_pinned=device.type == "cuda")
        return value.to(device, copy=True)


def _trained(student: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Trained tensors by name."""
    return ((name, parameter) for name, parameter in student.named_parameters() if parameter.requires_grad)
