"""One micro-batch of training on fake tensors: its operations and the bytes that it keeps alive, counted, not guessed.

The real loss of :class:`qvgen.training.module.VideoTraining` and the real backward pass run under FakeTensorMode: every
operator is called with its real shapes and dtypes, and none computes or allocates. A model that is small enough runs on real
tensors of zeros instead: the counts are the same, and an operator of a few kilobytes costs a tenth of its fake one.

Gradients exist beforehand, as they do from a step's second micro-batch on, so that a new one is a temporary that is added.

Blocks are identical: three short models (1, 2 and 3 blocks) are counted and continued to the whole one if what the
third adds is what the second added; the whole model is counted otherwise.

GPU precision is counted on fake CPU tensors, under CPU autocast with CUDA's list of operators that stay in float32: torch
2.13 runs no backward pass of fake CUDA tensors where there is no GPU.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from qvgen.config.schema import TrainConfig
from qvgen.data.noise import NoisyBatch
from qvgen.training.meta_model import build_family, build_student, build_teacher, fill_, num_blocks
from qvgen.training.module import VideoTraining
from qvgen.training.planning.operation_counter import OperationCounter, StepCount

COUNTED_BLOCKS = (1, 2, 3)

REAL_NUMBERS = 2**20
"""A model of at most so many parameters, on a micro-batch of at most so many latent values, is counted on real tensors."""


@dataclass(frozen=True, kw_only=True)
class StepSettings:
    """What a count depends on, besides the run's configuration.

    Attributes:
        micro_batch: Samples at once.
        gradient_checkpointing: Keep only the blocks' inputs.
        autocast: bfloat16 autocast over the student's float32 masters, as on a GPU; float32 otherwise.
        teacher_dtype: Of the teacher's weights.
        model_changes: Arguments of the family in place of the configuration's: sizes of clips.
    """

    micro_batch: int
    gradient_checkpointing: bool
    autocast: bool
    teacher_dtype: torch.dtype
    model_changes: tuple[tuple[str, Any], ...] = ()


def count_step(config: TrainConfig, settings: StepSettings, *, is_checked: bool = True) -> StepCount:
    """Count one micro-batch of the whole model, from short ones where it has more blocks.

    Args:
        config: The run's.
        settings: What is counted.
        is_checked: Count a third short model to see that blocks add equal amounts; False where the same model was
            checked before with other settings, for half the time.
    """
    blocks = num_blocks(build_family(config))
    if blocks <= COUNTED_BLOCKS[-1]:
        return count_blocks(config, settings, blocks=blocks)
    numbers = COUNTED_BLOCKS if is_checked else COUNTED_BLOCKS[:2]
    counts = [astuple(count_blocks(config, settings, blocks=number)) for number in numbers]
    first, second, last = counts[0], counts[1], counts[-1]
    if is_checked and any(c - b != b - a for a, b, c in zip(first, second, last, strict=True)):
        return count_blocks(config, settings, blocks=blocks)
    whole = [c + (blocks - numbers[-1]) * (b - a) for a, b, c in zip(first, second, last, strict=True)]
    return StepCount(**{field.name: value for field, value in zip(fields(StepCount), whole, strict=True)})


def count_blocks(config: TrainConfig, settings: StepSettings, *, blocks: int) -> StepCount:
    """Count one micro-batch of a model of so many blocks, operator by operator."""
    family = build_family(config, dict(settings.model_changes))  # its own: it may cache fake tensors
    student, _ = build_student(config, family, blocks=blocks)
    models = [student]
    if config.method.needs_teacher:
        models.append(build_teacher(family, dtype=settings.teacher_dtype, blocks=blocks))
    values = settings.micro_batch * math.prod(family.sample_shape)
    if max(values, sum(parameter.numel() for parameter in student.parameters())) <= REAL_NUMBERS:
        for model in models:
            fill_(model)
        draw, condition = _batch(family, settings.micro_batch)
        with torch.no_grad():  # fills what a family computes once, such as tables of positions
            family.predict(student, draw.noisy, draw.timestep, condition)
        return run_step(config, family, settings, models=models)
    with FakeTensorMode(allow_non_fake_inputs=True):  # positions that a family computed beforehand are real
        for model in models:
            fill_(model)
        return run_step(config, family, settings, models=models)


def run_step(config: TrainConfig, family: Any, settings: StepSettings, *, models: Sequence[nn.Module]) -> StepCount:
    """Forward and backward pass of the run's loss, counted.

    Args:
        config: The run's.
        family: Of the models.
        settings: What is counted.
        models: The student, and the teacher if the method has one; real or fake.
    """
    draw, condition = _batch(family, settings.micro_batch)
    student, teacher = models[0], models[1] if len(models) == 2 else None
    module = VideoTraining(replace(config, model=family), student=student, teacher=teacher, encode=lambda _: condition)
    known = [draw.noisy, draw.target, draw.timestep, *condition.values()]
    known += [tensor for model in models for tensor in (*model.parameters(), *model.buffers())]
    for parameter in student.parameters():
        parameter.grad = torch.zeros_like(parameter)
        known.append(parameter.grad)
    counter = OperationCounter(known, autocast=settings.autocast)
    if settings.gradient_checkpointing:
        student.enable_gradient_checkpointing(counter.checkpoint)  # type: ignore[operator]
    if teacher is not None:
        teacher.register_forward_pre_hook(lambda *_: counter.enter("teacher"))
        teacher.register_forward_hook(lambda *_: counter.enter("student"))
    with counter, counter.live:
        with counter.casts(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=settings.autocast):
            loss = module.loss(draw)
        kept = counter.live.live
        counter.enter("backward")
        loss.backward()
    return counter.result(kept_bytes=kept)


def _batch(family: Any, size: int) -> tuple[NoisyBatch, dict[str, Tensor]]:
    shape = (size, *family.sample_shape)
    draw = NoisyBatch(
        noisy=torch.zeros(shape), target=torch.zeros(shape), timestep=torch.zeros(size), captions=[""] * size
    )
    return draw, {"encoder_hidden_states": torch.zeros(size, *family.condition_shape)}
