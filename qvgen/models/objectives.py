"""What a diffusion transformer is trained to predict: pure formulas, no state but their constants.

Flow matching (rectified flow; Lipman et al. 2210.02747, Liu et al. 2209.03003; Wan 2503.20314):

    x_sigma = (1 - sigma) * x_0 + sigma * noise        sigma in [0, 1], 1 is pure noise
    v       = d x_sigma / d sigma = noise - x_0        the target; the same at every sigma
    sigma   = shift * u / (1 + (shift - 1) * u)        u uniform in [0, 1); shift > 1 favours high noise
    t       = 1000 * sigma                             what the transformer is told

The same formulas as diffusers' FlowMatchEulerDiscreteScheduler, which does the sampling. [ours] Training uses the shift that
sampling uses: QVGen's released code trains at 1 and samples at 3 (docs/method.md).

Left out: weightings of the loss over sigma, logit-normal draws.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

NUM_TRAIN_TIMESTEPS = 1000


@dataclass(frozen=True, kw_only=True)
class FlowMatching:
    """Flow matching with shifted noise levels.

    Attributes:
        shift: at least 1; 1 draws sigma uniformly, 3 puts half of the draws above sigma = 0.75.

    Raises:
        ValueError: for a shift below 1.
    """

    shift: float = 1.0

    def __post_init__(self) -> None:
        if not self.shift >= 1.0:
            raise ValueError(f"shift={self.shift} is below 1 and would favour clean samples; use 1 (uniform) to 10")

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
        """Draw one noise level, float32 [] in [0, 1)."""
        return self.shifted(torch.rand((), generator=generator))

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
        weight = _per_sample(sigma, like=clean)
        return (1 - weight) * clean + weight * noise

    def target(
        self, clean: Float[Tensor, "B C F H W"], noise: Float[Tensor, "B C F H W"], *, sigma: Float[Tensor, " B"]
    ) -> Float[Tensor, "B C F H W"]:
        """Return what a perfect model predicts on average, v = noise - clean; it does not depend on sigma."""
        del sigma
        return noise - clean


def _per_sample(sigma: Tensor, *, like: Tensor) -> Tensor:
    """Reshape [B] so that it broadcasts over [B, C, F, H, W]."""
    if sigma.shape != like.shape[:1]:
        raise ValueError(
            f"sigma has shape {list(sigma.shape)} for samples {list(like.shape)}; give one noise level per sample"
        )
    return sigma.to(like).view(-1, *(1,) * (like.ndim - 1))
