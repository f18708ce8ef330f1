"""How the tiny models are sampled: diffusers' steps of the flow, all videos of a batch at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from qvgen.models.few_step import read_timesteps
from qvgen.models.few_step_scheduler import OF_SCHEDULER, visited_timesteps, visiting
from qvgen.models.sampled_video import SampledVideo


@dataclass(frozen=True, kw_only=True)
class TinySampler:
    """The scheduler of a tiny model, and its steps.

    Attributes:
        shift: Shift of the noise levels; 1 is none.
        timesteps: ``model.timesteps``.
        sampler: ``model.sampler``.
        num_inference_steps: Steps of a few-step model.
    """

    shift: float
    timesteps: Any
    sampler: str | None
    num_inference_steps: int

    @cached_property
    def own_timesteps(self) -> tuple[float, ...] | None:
        """The timesteps of a few-step model, falling; None: it is none."""
        if self.timesteps == OF_SCHEDULER:
            scheduler = self._euler()
            scheduler.set_timesteps(self.num_inference_steps)
            return visited_timesteps(scheduler, self.num_inference_steps)
        return read_timesteps(self.timesteps, num_steps=self.num_inference_steps)

    def _euler(self) -> Any:
        from diffusers import FlowMatchEulerDiscreteScheduler

        return FlowMatchEulerDiscreteScheduler(shift=self.shift)

    def scheduler(self) -> Any:
        """A new scheduler; its noise levels are shifted but for those that a configuration gives."""
        if self.own_timesteps is None or (self.sampler is None and self.timesteps == OF_SCHEDULER):
            return self._euler()
        return visiting(self._euler(), self.own_timesteps, sampler=self.sampler)

    def sample(
        self,
        predict: Callable[[Tensor, Tensor], Tensor],
        seeds: Sequence[int],
        *,
        shape: Sequence[int],
        num_steps: int,
        guidance_scale: float,
        device: torch.device,
    ) -> Float[Tensor, "B C F S S"]:
        """Sample videos.

        Args:
            predict: Samples and their timesteps [B] to velocities; with guidance of 2 B rows, those with captions first.
            seeds: All noise of a sample is drawn from a generator of its own, with its seed.
            shape: (C, F, S, S) of a sample.
            num_steps: Sampling steps.
            guidance_scale: Classifier-free guidance; 1 is none.
            device: Where they are sampled.

        Returns:
            The samples, float32 [B, C, F, S, S].
        """
        scheduler = self.scheduler()
        scheduler.set_timesteps(num_steps, device=device)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        video = torch.stack([torch.randn(*shape, generator=generator) for generator in generators]).to(device)
        guided = guidance_scale != 1.0
        for timestep in scheduler.timesteps:
            batch = torch.cat((video, video)) if guided else video
            velocity = predict(batch, timestep.expand(len(batch)))
            if guided:
                with_caption, without = velocity.chunk(2)
                velocity = without + guidance_scale * (with_caption - without)
            video = scheduler.step(velocity, timestep, video, generator=generators, return_dict=False)[0]
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
