"""Sampling as Open-Sora's authors do: Euler steps from noise, the call without a caption in one batch with that with it.

    v = v_none + guidance (v_caption - v_none)        z <- z + (sigma_next - sigma) v

In place of a pipeline of diffusers, which has none for it; latents stay in float32 between calls.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Predict = Callable[[nn.Module, Tensor, Tensor, Mapping[str, Tensor]], Tensor]
"""A family's ``predict``."""


def lay_out_steps(scheduler: Any, num_steps: int, *, device: torch.device | None = None) -> None:
    """Have the scheduler make steps of equal length before its shift."""
    scheduler.set_timesteps(sigmas=np.linspace(1, 0, num_steps, endpoint=False), device=device)


@dataclass(frozen=True, kw_only=True)
class OpenSoraSampler:
    """The sampler of one transformer.

    Attributes:
        predict: The family's.
        transformer: Teacher, student or packed model.
        scheduler: FlowMatchEulerDiscreteScheduler with the video's shift.
        shape: [C, F, h, w] of a video's latents.
    """

    predict: Predict
    transformer: Any
    scheduler: Any
    shape: tuple[int, int, int, int]

    @torch.no_grad()
    def __call__(
        self,
        *,
        condition: Mapping[str, Tensor],
        negative: Mapping[str, Tensor] | None,
        num_inference_steps: int,
        guidance_scale: float,
        generator: torch.Generator,
        output_type: str = "latent",
    ) -> SimpleNamespace:
        """Sample one video.

        Args:
            condition: Rows [1, ...] of ``encode`` for its caption.
            negative: The same of what guidance leads away from; None: no guidance.
            num_inference_steps: Steps.
            guidance_scale: Factor of guidance.
            generator: Its noise is drawn from it, on the CPU.
            output_type: ``latent`` alone.

        Returns:
            ``frames``: latents, float32 [1, C, F, h, w].
        """
        assert output_type == "latent", output_type
        device = condition["encoder_hidden_states"].device
        latents = torch.randn(1, *self.shape, generator=generator).to(device)
        if negative is not None:
            condition = {name: torch.cat([negative[name], value]) for name, value in condition.items()}
        call = "cond" if negative is None else "cond_uncond"
        count = 1 if negative is None else 2
        lay_out_steps(self.scheduler, num_inference_steps, device=device)
        for timestep in self.scheduler.timesteps:
            with self.transformer.cache_context(call):
                many = latents.expand(count, *self.shape)
                velocity = self.predict(self.transformer, many, timestep.float().expand(count), condition).float()
            if negative is not None:
                none, own = velocity.chunk(2)
                velocity = none + guidance_scale * (own - none)
            latents = self.scheduler.step(velocity, timestep, latents, return_dict=False)[0]
        return SimpleNamespace(frames=latents)
