"""One micro-batch of training on tensors without values: its operations and the bytes that it keeps alive, counted.

The real loss (:mod:`qvgen.training.loss.prediction_loss`) and the real backward pass run, with real shapes and dtypes,
while operators compute nothing (:mod:`qvgen.training.planning.shape_operators`); where that does not suffice, on torch's
fake tensors, which count the same.

Gradients exist beforehand, as they do from a step's second micro-batch on, so that a new one is a temporary that is added.

Blocks are identical: three short models (1, 2 and 3 blocks) are counted and continued to the whole one if what the
third adds is what the second added; the whole model is counted otherwise.

GPU precision is counted on CPU tensors, under CPU autocast with CUDA's list of operators that stay in float32: torch 2.13
runs no backward pass of fake CUDA tensors where there is no GPU.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass, fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from qvgen.config.plain_json import mapping, whole
from qvgen.config.schema.loss import LossConfig
from qvgen.config.schema.sections import OptimConfig
from qvgen.data.noise import NoisyBatch
from qvgen.methods.base import Method
from qvgen.models.base import VideoDiT, example_condition
from qvgen.models.named_family import NamedFamily
from qvgen.training.blocks.checkpointing import block_checkpoint
from qvgen.training.design.meta_model import build_student, build_teacher, fill_, num_blocks
from qvgen.training.design.student import StudentDesign
from qvgen.training.loss.block_features import check_blocks
from qvgen.training.loss.prediction_loss import freeze_the_rest_, prediction_loss
from qvgen.training.optim.master_precision import narrow_masters_
from qvgen.training.planning.operation_counter import OperationCounter, StepCount
from qvgen.training.planning.shape_operators import ShapeOperators
from qvgen.training.records.keys import family_key
from qvgen.training.records.store import recorded

log = logging.getLogger(__name__)

COUNTED_BLOCKS = (1, 2, 3)
OPERATORS = ShapeOperators()
"""Those of all counts of this process: what an operator makes of its arguments' shapes depends on nothing else, and asking it
takes a third of the first count."""


@dataclass(frozen=True, kw_only=True)
class StepSettings:
    """What a count depends on, besides model and design.

    Attributes:
        micro_batch: Samples at once.
        gradient_checkpointing: Keep only the blocks' inputs.
        autocast: bfloat16 autocast over the student's float32 masters, as on a GPU; float32 otherwise.
        teacher_dtype: Of the teacher's weights.
        keep_attention: Keep the outputs of attention too, with ``gradient_checkpointing``.
        model_changes: Arguments of the family in place of its own: sizes of clips.
        loss: Weights and compared blocks; None: neither.
        masters: Type of trained weights of quantized layers.
        gradients: Type of their gradients.
    """

    micro_batch: int
    gradient_checkpointing: bool
    autocast: bool
    teacher_dtype: torch.dtype
    keep_attention: bool = False
    model_changes: tuple[tuple[str, Any], ...] = ()
    loss: LossConfig | None = None
    masters: str = "float32"
    gradients: str = "float32"


def count_step(
    model: NamedFamily, design: StudentDesign, settings: StepSettings, *, optim: OptimConfig, is_checked: bool = True
) -> StepCount:
    """Count one micro-batch of the whole model, from short ones where it has more blocks.

    Args:
        model: The model.
        design: The student's layers.
        settings: What is counted.
        optim: The optimizer, which decides with the method what is trained.
        is_checked: Count a third short model to see that blocks add equal amounts; False where the same model was
            checked before with other settings, for half the time.
    """
    if torch.are_deterministic_algorithms_enabled():  # then memory is filled, which is counted too
        return _count_step(model, design, settings, optim=optim, is_checked=is_checked)
    found: StepCount = recorded(
        lambda: {
            "kind": "step",
            "family": family_key(model.rebuild(dict(settings.model_changes)), model.section),
            "design": design,
            "settings": settings,
            "optim": optim,
            "checked": is_checked,
        },
        read=lambda content: StepCount(
            **{name: whole(value, name) for name, value in mapping(content, "count").items()}
        ),
        find=lambda: _count_step(model, design, settings, optim=optim, is_checked=is_checked),
        write=asdict,
    )
    return found


def _count_step(
    model: NamedFamily, design: StudentDesign, settings: StepSettings, *, optim: OptimConfig, is_checked: bool
) -> StepCount:
    """Count with the model's own code."""
    count = partial(count_blocks, model, design, settings, optim=optim)
    blocks = num_blocks(model.family)
    if blocks <= COUNTED_BLOCKS[-1]:
        return count(blocks=blocks)
    if settings.loss is not None and settings.loss.feature_blocks is not None:
        return _count_chosen(model, design, settings, settings.loss, optim=optim, is_checked=is_checked)
    numbers = COUNTED_BLOCKS if is_checked else COUNTED_BLOCKS[:2]
    counts = [astuple(count(blocks=number)) for number in numbers]
    whole = continued(counts, blocks=blocks)
    if whole is None:
        return count(blocks=blocks)
    return StepCount(**{field.name: value for field, value in zip(fields(StepCount), whole, strict=True)})


def _count_chosen(
    model: NamedFamily,
    design: StudentDesign,
    settings: StepSettings,
    loss: LossConfig,
    *,
    optim: OptimConfig,
    is_checked: bool,
) -> StepCount:
    """Count where some blocks are compared with the teacher's, which short models may not have.

    Each block keeps as much as its share of all blocks do. The peak is a bound: wherever it lies, no more than that is added.
    """
    assert loss.feature_blocks is not None
    blocks = num_blocks(model.family)
    check_blocks(loss.feature_blocks, count=blocks)
    without, every = (
        replace(loss, feature_weight=weight, feature_blocks=None) for weight in (0.0, loss.feature_weight)
    )
    low, high = (
        count_step(model, design, replace(settings, loss=of), optim=optim, is_checked=is_checked)
        for of in (without, every)
    )
    added = (high.kept_bytes - low.kept_bytes) * len(loss.feature_blocks) // blocks
    return replace(low, kept_bytes=low.kept_bytes + added, peak_bytes=low.peak_bytes + added)


def continued(counts: Sequence[Sequence[int]], *, blocks: int) -> list[int] | None:
    """Counts of a model of so many blocks, from those of models of 1, 2 (and 3) blocks.

    Args:
        counts: Of each short model the same numbers; a third one is compared with what the first two say.
        blocks: Of the whole model.

    Returns:
        The numbers; None where the third model adds something else than the second.

    Example:
        >>> continued([(5, 1), (7, 1), (9, 1)], blocks=10), continued([(5, 1), (7, 1), (9, 2)], blocks=10)
        ([23, 1], None)
    """
    first, second, last = counts[0], counts[1], counts[-1]
    if len(counts) == 3 and any(c - b != b - a for a, b, c in zip(first, second, last, strict=True)):
        return None
    return [c + (blocks - len(counts)) * (b - a) for a, b, c in zip(first, second, last, strict=True)]


def count_blocks(
    model: NamedFamily,
    design: StudentDesign,
    settings: StepSettings,
    *,
    optim: OptimConfig,
    blocks: int,
    is_fake: bool = False,
) -> StepCount:
    """Count one micro-batch of a model of so many blocks, operator by operator.

    Args:
        model: The model.
        design: The student's layers.
        settings: What is counted.
        optim: The optimizer, which decides with the method what is trained.
        blocks: Transformer blocks.
        is_fake: Count on torch's fake tensors, as is done where operators without results do not suffice.
    """
    family = model.rebuild(dict(settings.model_changes))  # its own: it may cache tensors without values
    student, _ = build_student(family, design, blocks=blocks)
    models = [student]
    if design.method.needs_teacher:
        models.append(build_teacher(family, dtype=settings.teacher_dtype, blocks=blocks))
    fills_memory = torch.are_deterministic_algorithms_enabled()
    if not is_fake and not fills_memory:
        try:
            return _count_models(
                family, settings, models=models, method=design.method, optim=optim, operators=OPERATORS
            )
        except RuntimeError as error:  # among others UnknownResultError; what is wrong with the model is met again
            log.debug("counted on fake tensors: %s", error)
            return count_blocks(model, design, settings, optim=optim, blocks=blocks, is_fake=True)
    with FakeTensorMode(allow_non_fake_inputs=True):  # positions that a family computed beforehand are real
        return _count_models(family, settings, models=models, method=design.method, optim=optim)


def _count_models(
    family: VideoDiT,
    settings: StepSettings,
    *,
    models: Sequence[nn.Module],
    method: Method,
    optim: OptimConfig,
    operators: ShapeOperators | None = None,
) -> StepCount:
    """Count with models on the meta device, which are given storage first."""
    for model in models:
        fill_(model)
    return run_step(family, settings, models=models, method=method, optim=optim, operators=operators)


def run_step(
    family: VideoDiT,
    settings: StepSettings,
    *,
    models: Sequence[nn.Module],
    method: Method,
    optim: OptimConfig,
    operators: ShapeOperators | None = None,
) -> StepCount:
    """Forward and backward pass of the run's loss, counted.

    Args:
        family: Of the models.
        settings: What is counted.
        models: The student, and the teacher if the method has one; real or fake.
        method: The training method.
        optim: The optimizer, which decides with the method what is trained.
        operators: What runs in place of operators; None: they compute.
    """
    draw, condition = _batch(family, settings.micro_batch)
    student, teacher = models[0], models[1] if len(models) == 2 else None
    known = [draw.noisy, draw.target, draw.timestep, *condition.values()]
    known += [tensor for model in models for tensor in (*model.parameters(), *model.buffers())]
    freeze_the_rest_(student, method=method, optim=optim)
    narrow_masters_(student, masters=settings.masters, gradients=settings.gradients)
    for parameter in student.parameters():
        parameter.grad = torch.empty_like(parameter, dtype=getattr(parameter, "grad_dtype", None))
        known.append(parameter.grad)
    counter = OperationCounter(known, autocast=settings.autocast, operators=operators)
    if settings.gradient_checkpointing:
        how = counter.counted(block_checkpoint(keep_attention=settings.keep_attention))
        student.enable_gradient_checkpointing(how)  # type: ignore[operator]
    if teacher is not None:
        teacher.requires_grad_(False).eval()
        teacher.register_forward_pre_hook(lambda *_: counter.enter("teacher"))
        teacher.register_forward_hook(lambda *_: counter.enter("student"))
    with counter:
        with counter.casts(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=settings.autocast):
            loss = prediction_loss(
                family, student, draw, condition, method=method, teacher=teacher, options=settings.loss
            )
        kept = counter.live
        counter.enter("backward")
        loss.backward()
    return counter.result(kept_bytes=kept)


def _batch(family: Any, size: int) -> tuple[NoisyBatch, dict[str, Tensor]]:
    shape = (size, *family.sample_shape)
    draw = NoisyBatch(noisy=torch.empty(shape), target=torch.empty(shape), timestep=torch.zeros(size), captions=[])
    return draw, example_condition(family, count=size, make=torch.empty)
