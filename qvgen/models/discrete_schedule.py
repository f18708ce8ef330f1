"""The part that objectives on whole timesteps share: x_t = a_t x_0 + b_t noise with a table of a_t^2, t in 0..999.

    a_t^2 = abar_t, b_t^2 = 1 - abar_t        sigma = t / 1000, only the name of a place on the schedule

A model's betas make the table; what it predicts is its own formula (:mod:`qvgen.models.objectives`).
"""

from __future__ import annotations

import abc
from functools import cached_property
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

NUM_TRAIN_TIMESTEPS = 1000


class DiscreteSchedule(abc.ABC):
    """A schedule of 1000 timesteps that are drawn uniformly."""

    last_timestep: ClassVar[int] = NUM_TRAIN_TIMESTEPS - 1

    @property
    @abc.abstractmethod
    def alphas_cumprod(self) -> Tensor:
        """abar, float32 [1000], falling."""

    def sample_sigma(self, *, generator: torch.Generator) -> Float[Tensor, ""]:
        """Draw one t uniformly from 0..999 and return t / 1000, float32 []."""
        return torch.randint(NUM_TRAIN_TIMESTEPS, (), generator=generator) / NUM_TRAIN_TIMESTEPS

    @cached_property
    def _log_ratios(self) -> Tensor:
        """log(b_t / a_t) of all t, float64 [1000], rising; infinite where t = 999 is pure noise."""
        alphas = self.alphas_cumprod.double()
        return ((1 - alphas) / alphas).log() / 2

    @property
    def log_ratio_ends(self) -> tuple[float, float]:
        """Logarithm of noise over signal at the first t and at the last one that has any signal."""
        finite = self._log_ratios[self._log_ratios.isfinite()]
        return float(finite[0]), float(finite[-1])

    def sigma_at(self, log_ratio: Float[Tensor, ""]) -> Float[Tensor, ""]:
        """Return t / 1000, float32 [], of the t whose logarithm of noise over signal is nearest to the given one.

        A t of pure noise is as far as infinity: none is nearest to it.
        """
        table = self._log_ratios
        borders = (table[1:] + table[:-1]) / 2
        return torch.searchsorted(borders, log_ratio.double()).float() / NUM_TRAIN_TIMESTEPS

    def signal_and_noise(self, timestep: Float[Tensor, " B"]) -> tuple[Float[Tensor, " B"], Float[Tensor, " B"]]:
        """Return what clean samples and noise are multiplied with at timesteps: a_t and b_t."""
        alphas = self.alphas_cumprod.to(timestep.device)[timestep.round().long()]
        return alphas.sqrt(), (1 - alphas).sqrt()

    def timestep(self, sigma: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Convert t / 1000 to t, float32 [...] of whole numbers in 0..999.

        >>> from qvgen.models.objectives import VPrediction
        >>> VPrediction().timestep(torch.tensor([0.0, 0.007, 0.999])).tolist()
        [0.0, 7.0, 999.0]
        """
        return (sigma * NUM_TRAIN_TIMESTEPS).round()

    def add_noise(
        self, clean: Float[Tensor, "B C F H W"], noise: Float[Tensor, "B C F H W"], *, sigma: Float[Tensor, " B"]
    ) -> Float[Tensor, "B C F H W"]:
        """Mix clean samples with noise.

        Args:
            clean: float [B, C, F, H, W], x_0.
            noise: float [B, C, F, H, W], standard normal.
            sigma: float [B] in [0, 0.999], t / 1000 of each sample.

        Returns:
            x_t: float [B, C, F, H, W]; noise exactly where abar is 0.
        """
        signal, spread = self.weights(sigma, like=clean)
        return signal * clean + spread * noise

    def weights(self, sigma: Float[Tensor, " B"], *, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return a_t and b_t of each sample, broadcasting over ``like`` [B, C, F, H, W]."""
        signal, spread = self.signal_and_noise(self.timestep(sigma))
        return per_sample(signal, like=like), per_sample(spread, like=like)


def check_betas(beta_start: float, beta_end: float, *, example: str) -> None:
    """Raise ValueError for betas that do not rise within (0, 1); ``example`` ends the message."""
    if not 0 < beta_start < beta_end < 1:
        raise ValueError(f"beta_start={beta_start} and beta_end={beta_end} do not rise within (0, 1); {example}")


def per_sample(sigma: Tensor, *, like: Tensor) -> Tensor:
    """Reshape [B] so that it broadcasts over ``like`` [B, C, F, H, W].

    Raises:
        ValueError: There is another number of noise levels than of samples.
    """
    if sigma.shape != like.shape[:1]:
        raise ValueError(
            f"sigma has shape {list(sigma.shape)} for samples {list(like.shape)}; give one noise level per sample"
        )
    return sigma.to(like).view(-1, *(1,) * (like.ndim - 1))
