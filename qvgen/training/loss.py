"""The loss of a micro-batch: the models are asked, the method compares their answers and says what is trained."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from qvgen.config.sections import OptimConfig
from qvgen.data.noise import NoisyBatch
from qvgen.errors import UserError
from qvgen.methods.base import Method
from qvgen.models.base import VideoDiT


def prediction_loss(
    family: VideoDiT,
    student: nn.Module,
    draw: NoisyBatch,
    condition: Mapping[str, Tensor],
    *,
    method: Method,
    teacher: nn.Module | None,
) -> Tensor:
    """What a method makes of a student's prediction.

    Args:
        family: Calls transformers of this kind.
        student: The transformer that is trained.
        draw: Noised samples with their data's own target.
        condition: Encoded captions, on the models' device.
        method: The training method.
        teacher: The frozen full-precision transformer, where the method needs it.

    Returns:
        float32 [].
    """
    prediction = family.predict(student, draw.noisy, draw.timestep, condition)
    reference = None
    if teacher is not None:
        # In its own dtype: autocast would cast every weight of it again in each step.
        with torch.no_grad(), torch.autocast(draw.noisy.device.type, enabled=False):
            reference = family.predict(teacher, draw.noisy, draw.timestep, condition)
    target = draw.target
    if method.compares == "noise":
        if not hasattr(family.objective, "noise"):
            raise UserError(
                f"{type(method).__name__} compares noise, and {type(family.objective).__name__} has no noise(prediction, "
                "noisy, timestep); write it (qvgen.models.base.Objective), or choose another method"
            )
        noise = partial(family.objective.noise, noisy=draw.noisy, timestep=draw.timestep)
        prediction, target = noise(prediction.float()), noise(target)
        reference = None if reference is None else noise(reference.float())
    return method.loss(prediction, teacher=reference, target=target, timestep=draw.timestep)


def freeze_the_rest_(student: nn.Module, *, method: Method, optim: OptimConfig) -> None:
    """Let no gradient be computed for what no group trains: it would pile up, and count in the gradients' norm.

    Raises:
        ValueError: The method trains nothing.
    """
    trained = {id(parameter) for group in method.parameter_groups(student, optim) for parameter in group["params"]}
    if not trained:
        raise ValueError(f"{type(method).__name__}.parameter_groups gives no parameter; name what is trained")
    for parameter in student.parameters():
        parameter.requires_grad_(parameter.requires_grad and id(parameter) in trained)
