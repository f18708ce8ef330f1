"""Draws of noise levels that are not the model's own: logit-normal, and with another shift (arXiv 2403.03206, Sec. 3.1).

With x = log(noise / signal), the logarithm of what noise is multiplied with over what the clean sample is multiplied with
(log(sigma / (1 - sigma)) with flow matching, log(b_t / a_t) with v-prediction):

    logit_normal    x = mean + log(shift) + std z,      z normal, cut to the noise levels that the model is made for
    uniform         as the objective draws: shift u / (1 + (shift - 1) u) with flow matching, a uniform t with v-prediction

With flow matching and shift 1 the first is sigma = sigmoid(mean + std z), which has given the density its name. In these
terms it is the same distribution of signal-to-noise ratios for both objectives. Pure noise has an infinite x: with
v-prediction the last t of a schedule with zero terminal SNR is never drawn.

A draw takes one uniform number from the sample's generator, as the model's own does, and z is its quantile: noise and
caption dropout of a sample are the same whatever its level, so that runs with different levels can be compared in pairs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from qvgen.config.schema.loss import LossConfig
from qvgen.data.noise import Objective
from qvgen.errors import UserError
from qvgen.models.few_step import FewSteps

SMALLEST_SHARE = 1e-6
"""Of the normal draws that have to lie among the model's noise levels: fewer could not be told from rounding."""


class LevelObjective(Objective, Protocol):
    """The part of an objective that logit-normal draws need."""

    @property
    def shift(self) -> float:
        """The model's own shift towards noise."""

    @property
    def log_ratio_ends(self) -> tuple[float, float]:
        """Logarithms of noise over signal at the lowest and the highest noise level of the model."""

    def sigma_at(self, log_ratio: Tensor) -> Tensor:
        """The noise level, float32 [], of a logarithm of noise over signal."""


@dataclass(frozen=True)
class LogitNormal:
    """An objective with logit-normal noise levels; all else is the given one's.

    Attributes:
        objective: The model's.
        center: Mean of the logarithm of noise over signal.
        std: Its standard deviation.

    Raises:
        UserError: Next to no draw lies among the model's noise levels.
    """

    objective: LevelObjective
    center: float
    std: float

    def __post_init__(self) -> None:
        low, high = self._ends()
        if not high - low > SMALLEST_SHARE:
            lowest, highest = (round(1 / (1 + math.exp(-end)), 4) for end in self.objective.log_ratio_ends)
            raise UserError(
                f"loss.level_mean and loss.level_shift put the middle of the noise levels at {self.center:.3g} (log of noise "
                f"over signal), far from the {lowest} to {highest} that this model is made for; move it towards them"
            )

    def sample_sigma(self, *, generator: torch.Generator) -> Tensor:
        """One noise level, float32 []."""
        low, high = self._ends()
        # rand gives multiples of 2^-24; their middles keep the normal number finite
        share = torch.rand((), generator=generator).double() + 2.0**-25
        normal = torch.special.ndtri(low + (high - low) * share)
        return self.objective.sigma_at(self.center + self.std * normal)

    def add_noise(self, clean: Tensor, noise: Tensor, *, sigma: Tensor) -> Tensor:
        """Noisy latents [B, C, F, H, W]."""
        return self.objective.add_noise(clean, noise, sigma=sigma)

    def target(self, clean: Tensor, noise: Tensor, *, sigma: Tensor) -> Tensor:
        """The prediction of a perfect model, [B, C, F, H, W]."""
        return self.objective.target(clean, noise, sigma=sigma)

    def timestep(self, sigma: Tensor) -> Tensor:
        """Timesteps in [0, 1000) of noise levels [B]."""
        return self.objective.timestep(sigma)

    def _ends(self) -> tuple[float, float]:
        """Shares of the whole normal distribution below the lowest and below the highest noise level."""
        ends = torch.tensor(self.objective.log_ratio_ends, dtype=torch.float64)
        low, high = torch.special.ndtr((ends - self.center) / self.std).tolist()
        return low, high


def training_objective(objective: Any, loss: LossConfig) -> Objective:
    """The objective that noises training samples: the model's own, or with other draws of noise levels.

    Args:
        objective: The model's.
        loss: The run's options.

    Raises:
        UserError: The objective cannot have these levels.
    """
    name, shift = type(objective).__name__, loss.level_shift
    if loss.draws_as_the_model:
        found: Objective = objective
    elif isinstance(objective, FewSteps) or loss.timestep_jitter:
        found = _few_step_objective(objective, loss)
    elif loss.levels == "uniform":
        if not hasattr(objective, "with_shift"):
            raise UserError(
                f"loss.level_shift={shift}: the uniform noise levels of {name} have no shift; write loss.levels=logit_normal "
                "too, or leave it out"
            )
        found = objective.with_shift(shift)
    else:
        lacking = [part for part in ("shift", "log_ratio_ends", "sigma_at") if not hasattr(objective, part)]
        if lacking:
            raise UserError(
                f"loss.levels=logit_normal: {name} has no {lacking[0]}; write it (qvgen.training.loss.noise_level), or write "
                "loss.levels=uniform"
            )
        shift = objective.shift if shift is None else shift
        found = LogitNormal(objective, center=loss.level_mean + math.log(shift), std=loss.level_std)
    return found


def _few_step_objective(objective: Any, loss: LossConfig) -> Objective:
    """Timesteps of a few-step model with jitter; see :func:`training_objective`."""
    if not isinstance(objective, FewSteps):
        raise UserError(
            f"loss.timestep_jitter={loss.timestep_jitter:g} moves the timesteps of a few-step model, and this model has none "
            "(model.timesteps); leave it out"
        )
    if loss.levels != "uniform" or loss.level_shift is not None:
        raise UserError(
            f"loss.levels={loss.levels} loss.level_shift={loss.level_shift}: a few-step model is trained at its own "
            f"timesteps {[round(t, 2) for t in objective.timesteps]} alone; leave both out"
        )
    return replace(objective, jitter=loss.timestep_jitter)
