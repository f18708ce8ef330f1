"""How the tiny models are sampled: diffusers' Euler steps of the flow, all videos of a batch at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from qvgen.models.few_step import visiting
from qvgen.models.sampled_video import SampledVideo


def euler_scheduler(*, shift: float, timesteps: Sequence[float] | None) -> Any:
    """Make a new scheduler: of shifted noise levels, or where ``timesteps`` are given of those alone."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    return scheduler if timesteps is None else visiting(scheduler, timesteps)


def euler_steps(
    predict: Callable[[Tensor, Tensor], Tensor],
    noise: Float[Tensor, "B C F S S"],
    *,
    scheduler: Any,
    guidance_scale: float,
) -> Float[Tensor, "B C F S S"]:
    """Take the steps of a scheduler that was told how many they are.

    Args:
        predict: Samples and their timesteps [B] to velocities; with guidance of 2 B rows, those with captions first.
        noise: float32 [B, C, F, S, S].
        scheduler: A :func:`euler_scheduler`.
        guidance_scale: Classifier-free guidance; 1 is none.

    Returns:
        The samples, float32 [B, C, F, S, S].
    """
    video, guided = noise, guidance_scale != 1.0
    for timestep in scheduler.timesteps:
        batch = torch.cat((video, video)) if guided else video
        velocity = predict(batch, timestep.expand(len(batch)))
        if guided:
            with_caption, without = velocity.chunk(2)
            velocity = without + guidance_scale * (with_caption - without)
        video = scheduler.step(velocity, timestep, video, return_dict=False)[0]
    return video


def checked_frames(
    video: Float[Tensor, "B C F S S"], *, transformer: nn.Module, captions: Sequence[str], seeds: Sequence[int]
) -> UInt8[Tensor, "B F S S 3"]:
    """Turn sampled videos about [-1, 1] into frames on the CPU.

    Raises:
        ValueError: One is not finite, or of one colour; see :mod:`qvgen.models.sampled_video`.
    """
    pixels = ((video.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    frames = pixels.permute(0, 2, 3, 4, 1).cpu()
    for caption, seed, latents, shown in zip(captions, seeds, video, frames, strict=True):
        sampled = SampledVideo(transformer=transformer, caption=caption, seed=seed)
        sampled.check_finite(latents, name="latents")
        sampled.check_frames(shown)
    return frames
