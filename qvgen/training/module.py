"""The LightningModule of every method that trains a transformer; the loss is the method's (:mod:`qvgen.training.loss`).

The student's parameters are float32 masters, or what ``optim.masters`` says (:mod:`qvgen.training.optim.master_precision`);
the teacher is frozen, in no checkpoint, and not a submodule. All randomness of a step comes from (seed, step, sample id):
see :mod:`qvgen.data.noise`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.hooks import RemovableHandle

from qvgen.data.noise import NoisyBatch, add_noise, sample_generator
from qvgen.data.source import IMAGE_CONDITION
from qvgen.deploy.delta_switch import find_switch
from qvgen.methods.base import Method
from qvgen.models.base import Encode, VideoDiT
from qvgen.models.context_parallel import SharedSequence
from qvgen.models.few_step import caption_dropout
from qvgen.training.blocks.compiled import uncompiled
from qvgen.training.blocks.teacher_offload import OffloadedBlocks
from qvgen.training.design.training_run import TrainingRun
from qvgen.training.distributed.sharded_strategy import ShardedStrategy
from qvgen.training.distributed.sharding import add_gradients_by_block_
from qvgen.training.loss.block_features import check_features
from qvgen.training.loss.noise_level import training_objective
from qvgen.training.loss.ode_window import window_velocity
from qvgen.training.loss.prediction_loss import freeze_the_rest_, prediction_loss
from qvgen.training.optim.master_precision import narrow_masters_
from qvgen.training.optimizer_module import OptimizerModule
from qvgen.training.stop_point import interruptible


class VideoTraining(OptimizerModule):
    """Trains a student transformer.

    Args:
        run: What is trained; data and strategy are the trainer's.
        student: The transformer that is trained (quantized, or not for pretraining).
        teacher: The frozen full-precision transformer; None if the method has no use for it.
        encode: Turns captions into conditions: the data's, so that no text encoder runs while training.
        validate: Measures the held-out relative error of the student, in all processes; None: it is never measured.
        validate_every_steps: Optimizer steps between two measurements, in all processes; also after the last. None: never.
        share_out: Shards both models, which are on the meta device until then, over the processes' mesh; None: they stay
            whole.

    Attributes:
        relative_error: What was measured last, in all processes.
        averaged: While it is entered with the student, the student is what is to be measured: itself, or an average.
    """

    def __init__(
        self,
        run: TrainingRun,
        *,
        student: nn.Module,
        teacher: nn.Module | None,
        encode: Encode,
        validate: Callable[[nn.Module], float] | None = None,
        validate_every_steps: int | None = None,
        share_out: Callable[[DeviceMesh, torch.device], None] | None = None,
    ) -> None:
        super().__init__(optim=run.steps.optim, num_steps=run.steps.num_steps, seed=run.steps.seed)
        method: Method = run.design.method
        family: VideoDiT = run.model.family
        self.student = student
        if method.needs_teacher != (teacher is not None):
            raise ValueError(
                f"{type(method).__name__}.needs_teacher={method.needs_teacher} and a teacher is "
                f"{'there' if teacher is not None else 'missing'}; pass one exactly where the method needs it"
            )
        # In a tuple, so that it is no submodule: no checkpoint, optimizer or wrapper may see it.
        self._teacher = (teacher.requires_grad_(False).eval(),) if teacher is not None else ()
        self.family, self.encode, self.method = family, encode, method
        self._loss_options, self._objective = run.steps.loss, training_objective(family.objective, run.steps.loss)
        check_features(self._loss_options, method=method, name=type(method).__name__)
        self._share_out = share_out
        self._validate, self._validate_every_steps = validate, validate_every_steps
        self._last_step = 0
        self.relative_error: float | None = None
        freeze_the_rest_(student, method=method, optim=self.optim)
        narrow_masters_(student, masters=self.optim.masters, gradients=self.optim.gradients)
        self._handles: list[RemovableHandle] = []
        self._context = run.strategy.context_parallel
        self._sequence: SharedSequence | None = None
        self._offloads_teacher = run.strategy.teacher_offload
        self._offloaded: OffloadedBlocks | None = None
        self.averaged: Callable[[nn.Module], AbstractContextManager[Any]] = nullcontext

    @property
    def trained(self) -> nn.Module:
        """The student."""
        return self.student

    def setup(self, stage: str) -> None:
        """Bring the teacher to the student's device; a sharded one is put there by :meth:`configure_model`."""
        del stage
        if self._share_out is None:
            for teacher in self._teacher:
                if self._offloads_teacher:
                    self._offloaded = OffloadedBlocks(teacher, self.device)
                else:
                    teacher.to(self.device)

    def configure_model(self) -> None:
        """Shard the models, where the strategy made a mesh; before there is an optimizer."""
        if self._share_out is None:
            self._handles = add_gradients_by_block_(self.student)
            return
        strategy = self.trainer.strategy
        assert isinstance(strategy, ShardedStrategy)
        self._share_out(strategy.sharing_mesh(), strategy.root_device)

    def teardown(self, stage: str) -> None:
        """Leave the student without the hooks of training."""
        del stage
        while self._handles:
            self._handles.pop().remove()
        if self._sequence is not None:
            self._sequence.remove_()
        if self._offloaded is not None:
            self._offloaded.remove()

    def is_measured(self, step: int) -> bool:
        """Every so many steps, after the last one, and after one that a callback ends the run with."""
        every = self._validate_every_steps
        is_last = step == self.num_steps or self.trainer.should_stop
        return every is not None and step > 0 and (step % every == 0 or is_last)

    def on_train_start(self) -> None:
        """Have Lightning go back to a measurement that a stop has cut short."""
        self._last_step = self.global_step
        if self._context > 1:
            models = [self.student, *self._teacher]
            self._sequence = SharedSequence(models, processes=self._context, device=self.device)
        self._measure_next(self.is_measured(self.global_step))

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Have Lightning measure after a step that is due, once however many micro-batches it has."""
        del outputs, batch, batch_idx
        is_complete, self._last_step = self.global_step != self._last_step, self.global_step
        self._measure_next(is_complete and self.is_measured(self.global_step))

    def _measure_next(self, is_due: bool) -> None:
        # By our own count of steps: Lightning counts micro-batches, and would leave out a last step that is no multiple.
        self.trainer.val_check_batch = 1 if is_due else float("inf")

    def on_validation_model_eval(self) -> None:
        """Leave the modes alone: whoever measures sets and restores them, also at the end of a run."""

    def on_validation_model_train(self) -> None:
        """See :meth:`on_validation_model_eval`."""

    def validation_step(self, batch: Any, batch_index: int) -> None:
        """Measure; the only batch stands for the whole measurement."""
        del batch, batch_index
        self.measure()
        # The loggers get it with the step's row.
        self.log("val/relative_error", self.relative_error or 0.0, batch_size=1, logger=False)

    def measure(self) -> None:
        """Measure the student as the end of a run does; all processes call it.

        Raises:
            Stopped: In all processes, where any of them was asked to stop; Lightning measures again when the run goes on.
        """
        assert self._validate is not None, "validate_every_steps needs it"
        with (
            self.averaged(self.student),
            torch.autocast(self.device.type, enabled=False),
            uncompiled(self.student),
            interruptible(self.student, together=self._share_out is not None or self._context > 1),
            nullcontext() if self._sequence is None else self._sequence.applied(),
        ):
            self.relative_error = self._validate(self.student)

    def draw(self, batch: dict[str, Any], *, step: int) -> NoisyBatch:
        """Noise a batch of ``video`` [B, C, F, H, W], ``caption`` and ``sample_id`` [B] for an optimizer step.

        Where the model is told the first frame, the batch has its ``image_condition`` too.
        """
        generators = [sample_generator("train", self.seed, step, int(i)) for i in batch["sample_id"]]
        return add_noise(
            batch["video"],
            batch["caption"],
            objective=self._objective,
            generators=generators,
            caption_dropout=caption_dropout(self.family, self.method.caption_dropout),
            image=batch.get(IMAGE_CONDITION),
        )

    def loss(self, draw: NoisyBatch) -> Tensor:
        """The method's loss of a micro-batch, float32 []."""
        encoded = {**self.encode(draw.captions), **draw.image}
        condition = {key: value.to(self.device) for key, value in encoded.items()}
        teacher = self._teacher[0] if self._teacher else None
        if (window := self.method.window) is not None and teacher is not None:
            target = window_velocity(self.family, teacher, draw, condition, encode=self.encode, window=window)
            draw, teacher = replace(draw, target=target), None
        return prediction_loss(
            self.family, self.student, draw, condition, method=self.method, teacher=teacher, options=self._loss_options
        )

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The method's groups."""
        return self.method.parameter_groups(self.student, self.optim)

    def _draw_widths(self, batch: dict[str, Any], *, step: int) -> None:
        """Where a policy will switch activation widths: one of them for each sample, from (seed, step, sample id)."""
        switch = find_switch(self.student)
        if switch is not None:
            draws = [sample_generator("activation_width", self.seed, step, int(i)) for i in batch["sample_id"]]
            widths = switch.config.widths
            switch.band.policy_bits = tuple(widths[int(torch.randint(2, (), generator=draw))] for draw in draws)

    def training_step(self, batch: dict[str, Any], batch_index: int) -> Tensor:
        """Loss of one micro-batch; one that is not finite stops the run before the step changes anything.

        Where processes share a sequence out, each has a part of the gradient, and the mean of all processes is taken: the
        loss counts as often as there are parts (:mod:`qvgen.training.distributed.context`).
        """
        del batch_index
        self._draw_widths(batch, step=self.global_step)
        if self._sequence is not None:
            self._sequence.apply_()
        loss = self.loss(self.draw(batch, step=self.global_step))
        self.step_losses.append(loss.detach())
        return loss * self._context if self._context > 1 else loss

    def on_after_backward(self) -> None:
        """Whoever calls the models between micro-batches, perhaps in one process alone, has them whole."""
        if self._sequence is not None:
            self._sequence.remove_()
