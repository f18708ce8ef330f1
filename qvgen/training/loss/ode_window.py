"""The mean velocity of a teacher's small steps over one step of a few-step student (:mod:`qvgen.methods.few_step`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qvgen.data.noise import NoisyBatch
from qvgen.errors import UserError
from qvgen.methods.base import Method, OdeWindow
from qvgen.models.base import Encode, VideoDiT
from qvgen.models.discrete_schedule import NUM_TRAIN_TIMESTEPS, per_sample
from qvgen.models.few_step import FewSteps, draws_noise_anew, own_levels
from qvgen.models.objectives import FlowMatching


def check_window(method: Method, *, name: str, family: Any) -> None:
    """Raise UserError where a method, called ``name``, distills into few steps and the family has none, or no flow."""
    if method.window is None:
        return
    objective = family.objective
    if not isinstance(objective, FewSteps):
        raise UserError(
            f"method={name} distills into a few steps, and model={family.name} has none; write "
            "model.timesteps=[1000,900,750,500] and model.num_inference_steps=4, or another model"
        )
    if not isinstance(objective.objective, FlowMatching):
        raise UserError(
            f"method={name} follows a flow, and {type(objective.objective).__name__} of model={family.name} is none"
        )


@torch.no_grad()
def window_velocity(
    family: VideoDiT,
    teacher: nn.Module,
    draw: NoisyBatch,
    condition: Mapping[str, Tensor],
    *,
    encode: Encode,
    window: OdeWindow,
) -> Tensor:
    """Mean velocity with which the teacher carries samples from their timesteps to the next ones, or with lcm to the end.

    Args:
        family: Calls the teacher; its ``own_levels`` are the student's.
        teacher: Full precision, in its own dtype.
        draw: Noised samples at the student's timesteps.
        condition: Encoded captions, on the samples' device.
        encode: Encodes the caption that guidance leads away from.
        window: Steps and guidance.

    Returns:
        float32 [B, C, F, H, W].
    """
    ends = torch.tensor([*(own_levels(family) or ()), 0.0], device=draw.timestep.device) / NUM_TRAIN_TIMESTEPS
    start = draw.timestep / NUM_TRAIN_TIMESTEPS
    following = ends[1:][(ends[:-1] - start[:, None]).abs().argmin(1)]
    end = torch.zeros_like(start) if draws_noise_anew(family) else following
    length = (start - end) / window.substeps
    is_guided = window.guidance_scale != 1
    if is_guided:
        negative = encode([family.negative_prompt] * len(start))
        # An image is the same in the call without the caption.
        condition = {key: torch.cat((value, negative.get(key, value).to(value))) for key, value in condition.items()}
    x = draw.noisy
    with torch.autocast(x.device.type, enabled=False):
        for step in range(window.substeps):
            timestep = family.objective.timestep(start - step * length)
            if is_guided:
                both = family.predict(teacher, torch.cat((x, x)), torch.cat((timestep, timestep)), condition).float()
                with_caption, without = both.chunk(2)
                velocity = without + window.guidance_scale * (with_caption - without)
            else:
                velocity = family.predict(teacher, x, timestep, condition).float()
            x = x - per_sample(length, like=x) * velocity
    return (draw.noisy - x) / per_sample(length * window.substeps, like=x)
