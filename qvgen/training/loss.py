"""The loss of a micro-batch: the models are asked, and the training method compares their answers."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from qvgen.data.noise import NoisyBatch
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
    return method.loss(prediction, teacher=reference, target=draw.target, timestep=draw.timestep)
