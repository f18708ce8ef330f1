"""Noise, noise level and caption dropout of a sample: a pure function of (seed, step, sample id).

Every sample of every optimizer step has a generator of its own, so what it draws does not depend on its batch mates, on
how a batch is cut into micro-batches and processes, or on whether the run was resumed. The generator is the CPU's
on every device.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor


class Objective(Protocol):
    """The part of an objective (:mod:`qvgen.models.objectives`) that noising needs."""

    def sample_sigma(self, *, generator: torch.Generator) -> Tensor:
        """One noise level, float32 []."""

    def add_noise(self, clean: Tensor, noise: Tensor, *, sigma: Tensor) -> Tensor:
        """Noisy latents [B, C, F, H, W]."""

    def target(self, clean: Tensor, noise: Tensor, *, sigma: Tensor) -> Tensor:
        """The prediction of a perfect model, [B, C, F, H, W]."""

    def timestep(self, sigma: Tensor) -> Tensor:
        """Timesteps in [0, 1000) of noise levels [B]."""


@dataclass(frozen=True, kw_only=True)
class NoisyBatch:
    """A batch as a diffusion transformer sees it.

    Attributes:
        noisy: float32 [B, C, F, H, W].
        timestep: float32 [B] in [0, 1000).
        target: float32 [B, C, F, H, W], the data's own target.
        captions: One per sample; the empty one where the caption was dropped.
        image: The condition that each clip's first frame became, which is never dropped; empty for models without one.
    """

    noisy: Tensor
    timestep: Tensor
    target: Tensor
    captions: list[str]
    image: Mapping[str, Tensor] = field(default_factory=dict)


def sample_generator(*keys: int | str) -> torch.Generator:
    """A CPU generator that depends on the keys alone, for example ("train", seed, step, sample id)."""
    digest = hashlib.blake2b("/".join(map(str, keys)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def add_noise(
    clean: Tensor,
    captions: Sequence[str],
    *,
    objective: Objective,
    generators: Sequence[torch.Generator],
    caption_dropout: float = 0.0,
    image: Mapping[str, Tensor] | None = None,
) -> NoisyBatch:
    """Draw a noise level, a noise and a caption dropout for every sample, in this order, from its own generator.

    Args:
        clean: float32 [B, C, F, H, W], clean latents (or pixels).
        captions: B captions.
        objective: The model's.
        generators: B generators.
        caption_dropout: Probability in [0, 1] that a caption is replaced by the empty one.
        image: The condition that each clip's first frame became, B rows each.
    """
    sigmas, noises, kept = [], [], []
    for caption, generator in zip(captions, generators, strict=True):
        sigmas.append(objective.sample_sigma(generator=generator))
        noises.append(torch.randn(clean.shape[1:], generator=generator))
        dropped = float(torch.rand((), generator=generator)) < caption_dropout
        kept.append("" if dropped else caption)
    sigma, noise = torch.stack(sigmas).to(clean.device), torch.stack(noises).to(clean.device)
    return NoisyBatch(
        noisy=objective.add_noise(clean, noise, sigma=sigma),
        timestep=objective.timestep(sigma),
        target=objective.target(clean, noise, sigma=sigma),
        captions=kept,
        image=image or {},
    )
