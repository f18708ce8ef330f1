"""The targets that a diffusion transformer is trained to predict: pure formulas, no state but their constants.

Flow matching (rectified flow; Lipman et al. 2210.02747, Liu et al. 2209.03003; Wan 2503.20314):

    x_sigma = (1 - sigma) * x_0 + sigma * noise        sigma in [0, 1], 1 is pure noise
    v       = d x_sigma / d sigma = noise - x_0        the target; the same at every sigma
    sigma   = shift * u / (1 + (shift - 1) * u)        u uniform in [0, 1); shift > 1 favours high noise
    t       = 1000 * sigma                             what the transformer is told

The same formulas as diffusers' FlowMatchEulerDiscreteScheduler, which does the sampling. [ours] Training uses the shift that
sampling uses: QVGen's released code trains at 1 and samples at 3 (docs/method.md).

v-prediction (Salimans and Ho 2202.00512; zero terminal SNR: Lin et al. 2305.08891; CogVideoX 2408.06072):

    x_t   = a_t * x_0 + b_t * noise        a_t^2 = abar_t, b_t^2 = 1 - abar_t, t a whole number in 0..999
    v     = a_t * noise - b_t * x_0        the target
    sigma = t / 1000                       here only the name of a place on the schedule
    abar  = cumprod(1 - beta), then abar / (k + (1 - k) abar) with k = snr_shift_scale, then sqrt(abar) shifted and
            scaled so that its last entry is 0 and its first is unchanged; sqrt(beta) is linear in t

The same formulas as diffusers' CogVideoXDDIMScheduler.

Prediction of the noise (epsilon; Ho et al. 2006.11239; Latte 2401.03048): x_t as with v-prediction, beta linear in t, and the
target is the noise itself. The same formulas as diffusers' DDIMScheduler.

Noise levels of all are compared by the logarithm of noise over signal, x = log(b / a): log(sigma / (1 - sigma)) with flow
matching and log(b_t / a_t) with the two others. A shift adds log(shift) to it (arXiv 2403.03206, Eq. 23); what
``snr_shift_scale`` k does to v-prediction's table before its last entry is moved is a shift of sqrt(k).

Other draws of noise levels are :mod:`qvgen.training.loss.noise_level`, weights over them
:mod:`qvgen.training.loss.min_snr`. Left out: other beta schedules.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from qvgen.models.discrete_schedule import NUM_TRAIN_TIMESTEPS as NUM_TRAIN_TIMESTEPS
from qvgen.models.discrete_schedule import DiscreteSchedule, check_betas, per_sample


@dataclass(frozen=True, kw_only=True)
class FlowMatching:
    """Flow matching with shifted noise levels.

    Attributes:
        shift: at least 1; 1 draws sigma uniformly, 3 puts half of the draws above sigma = 0.75.
        lowest: sigma that draws begin at, in [0, 1): a model may be made for a part of the noise levels only.
        highest: sigma that draws end below, in (lowest, 1].

    Raises:
        ValueError: for a shift below 1, or bounds that are no range.
    """

    shift: float = 1.0
    lowest: float = 0.0
    highest: float = 1.0

    def __post_init__(self) -> None:
        if not self.shift >= 1.0:
            raise ValueError(f"shift={self.shift} is below 1 and would favour clean samples; use 1 (uniform) or more")
        if not 0.0 <= self.lowest < self.highest <= 1.0:
            raise ValueError(f"lowest={self.lowest} and highest={self.highest} are no range of noise levels in [0, 1]")

    def shifted(self, u: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Shift uniform noise levels.

        Args:
            u: float32 [...] in [0, 1].

        Returns:
            sigma: float32 [...] in [0, 1]; 0 and 1 are fixed points.

        >>> FlowMatching(shift=3.0).shifted(torch.tensor([0.0, 0.5, 1.0])).tolist()
        [0.0, 0.75, 1.0]
        """
        return self.shift * u / (1 + (self.shift - 1) * u)

    def sample_sigma(self, *, generator: torch.Generator) -> Float[Tensor, ""]:
        """Draw one noise level, float32 [] in [lowest, highest) but for rounding; the shifted density, cut."""
        start, end = (sigma / (self.shift - (self.shift - 1) * sigma) for sigma in (self.lowest, self.highest))
        return self.shifted(start + (end - start) * torch.rand((), generator=generator))

    @property
    def log_ratio_ends(self) -> tuple[float, float]:
        """Logarithm of noise over signal at the lowest and at the highest noise level; minus and plus infinity at 0 and 1."""
        ends = torch.tensor([self.lowest, self.highest], dtype=torch.float64).logit().tolist()
        return ends[0], ends[1]

    def sigma_at(self, log_ratio: Float[Tensor, ""]) -> Float[Tensor, ""]:
        """Return the noise level, float32 [] in [0, 1], of a logarithm of noise over signal; exact but for rounding.

        >>> round(FlowMatching().sigma_at(torch.tensor(3.0).log()).item(), 6)
        0.75
        """
        return log_ratio.sigmoid().float()

    def with_shift(self, shift: float) -> FlowMatching:
        """Return the same objective whose draws have another shift."""
        return replace(self, shift=shift)

    def signal_and_noise(self, timestep: Float[Tensor, " B"]) -> tuple[Float[Tensor, " B"], Float[Tensor, " B"]]:
        """Return what clean samples and noise are multiplied with at timesteps: 1 - sigma and sigma."""
        sigma = timestep / NUM_TRAIN_TIMESTEPS
        return 1 - sigma, sigma

    def timestep(self, sigma: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Convert noise levels in [0, 1] to timesteps in [0, 1000], float32 [...]."""
        return sigma * NUM_TRAIN_TIMESTEPS

    def add_noise(
        self, clean: Float[Tensor, "B C F H W"], noise: Float[Tensor, "B C F H W"], *, sigma: Float[Tensor, " B"]
    ) -> Float[Tensor, "B C F H W"]:
        """Mix clean samples with noise.

        Args:
            clean: float [B, C, F, H, W], x_0.
            noise: float [B, C, F, H, W], standard normal.
            sigma: float [B] in [0, 1], one noise level per sample.

        Returns:
            x_sigma: float [B, C, F, H, W]; sigma = 0 gives clean and sigma = 1 noise, exactly.
        """
        weight = per_sample(sigma, like=clean)
        return (1 - weight) * clean + weight * noise

    def target(
        self, clean: Float[Tensor, "B C F H W"], noise: Float[Tensor, "B C F H W"], *, sigma: Float[Tensor, " B"]
    ) -> Float[Tensor, "B C F H W"]:
        """Return what a perfect model predicts on average, v = noise - clean; it does not depend on sigma."""
        del sigma
        return noise - clean

    def noise(
        self,
        prediction: Float[Tensor, "B C F H W"],
        *,
        noisy: Float[Tensor, "B C F H W"],
        timestep: Float[Tensor, " B"],
    ) -> Float[Tensor, "B C F H W"]:
        """Return the noise that a prediction for noisy samples implies, x_sigma + (1 - sigma) v."""
        return noisy + (1 - per_sample(timestep / NUM_TRAIN_TIMESTEPS, like=noisy)) * prediction


@dataclass(frozen=True, kw_only=True)
class VPrediction(DiscreteSchedule):
    """v-prediction on a schedule of 1000 steps.

    Attributes:
        beta_start: beta of t = 0, in (0, 1).
        beta_end: beta of t = 999, in (0, 1).
        snr_shift_scale: k > 0; the signal-to-noise ratio is divided by it.
        zero_terminal_snr: whether t = 999 is pure noise.

    Raises:
        ValueError: for values outside of these ranges.
    """

    beta_start: float = 0.00085
    beta_end: float = 0.012
    snr_shift_scale: float = 1.0
    zero_terminal_snr: bool = True

    def __post_init__(self) -> None:
        check_betas(self.beta_start, self.beta_end, example="CogVideoX uses 0.00085 and 0.012")
        if not self.snr_shift_scale > 0:
            raise ValueError(
                f"snr_shift_scale={self.snr_shift_scale} is not positive; CogVideoX uses 3 (2b) and 1 (5b)"
            )

    @cached_property
    def alphas_cumprod(self) -> Tensor:
        """abar, float32 [1000]; computed in float64, as the products of a thousand factors need."""
        ends = self.beta_start**0.5, self.beta_end**0.5
        betas = torch.linspace(*ends, NUM_TRAIN_TIMESTEPS, dtype=torch.float64) ** 2
        table = torch.cumprod(1 - betas, dim=0)
        table = table / (self.snr_shift_scale + (1 - self.snr_shift_scale) * table)
        if self.zero_terminal_snr:
            root = table.sqrt()
            table = ((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2
        return table.float()

    @property
    def shift(self) -> float:
        """The model's own shift of noise over signal: the root of what its signal-to-noise ratio is divided by."""
        return math.sqrt(self.snr_shift_scale)

    def target(
        self, clean: Float[Tensor, "B C F H W"], noise: Float[Tensor, "B C F H W"], *, sigma: Float[Tensor, " B"]
    ) -> Float[Tensor, "B C F H W"]:
        """Return what a perfect model predicts on average, v = a_t noise - b_t clean."""
        signal, spread = self.weights(sigma, like=clean)
        return signal * noise - spread * clean

    def noise(
        self,
        prediction: Float[Tensor, "B C F H W"],
        *,
        noisy: Float[Tensor, "B C F H W"],
        timestep: Float[Tensor, " B"],
    ) -> Float[Tensor, "B C F H W"]:
        """Return the noise that a prediction for noisy samples implies, a_t v + b_t x_t."""
        signal, spread = self.weights(timestep / NUM_TRAIN_TIMESTEPS, like=noisy)
        return signal * prediction + spread * noisy


@dataclass(frozen=True, kw_only=True)
class EpsilonPrediction(DiscreteSchedule):
    """Prediction of the noise on a schedule of 1000 steps whose betas are linear in t.

    Attributes:
        beta_start: beta of t = 0, in (0, 1).
        beta_end: beta of t = 999, in (0, 1).

    Raises:
        ValueError: for betas that do not rise within (0, 1).
    """

    beta_start: float = 0.0001
    beta_end: float = 0.02

    predicts_noise: ClassVar[bool] = True
    shift: ClassVar[float] = 1.0

    def __post_init__(self) -> None:
        check_betas(self.beta_start, self.beta_end, example="Latte uses 0.0001 and 0.02")

    @cached_property
    def alphas_cumprod(self) -> Tensor:
        """abar, float32 [1000]; computed in float32 as the scheduler does, with whose table the model is sampled."""
        return torch.cumprod(1 - torch.linspace(self.beta_start, self.beta_end, NUM_TRAIN_TIMESTEPS), dim=0)

    def target(
        self, clean: Float[Tensor, "B C F H W"], noise: Float[Tensor, "B C F H W"], *, sigma: Float[Tensor, " B"]
    ) -> Float[Tensor, "B C F H W"]:
        """Return what a perfect model predicts on average: the noise, at every t."""
        del clean, sigma
        return noise

    def noise(
        self,
        prediction: Float[Tensor, "B C F H W"],
        *,
        noisy: Float[Tensor, "B C F H W"],
        timestep: Float[Tensor, " B"],
    ) -> Float[Tensor, "B C F H W"]:
        """Return the noise that a prediction implies: it is one."""
        del noisy, timestep
        return prediction
