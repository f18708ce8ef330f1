"""Noise levels as linear-quadratic sampling lays its steps: half of them remove the first 2.5 % of the noise.

With c = :data:`THRESHOLD`, step i of N, an even number, has removed, at u = i / N,

    2 c u                                       in the first half
    4 (1 - 2 c) u^2 - (4 - 10 c) u + 1 - 2 c    in the second: as much and as fast at u = 1/2, and all at u = 1

The same levels as ``linear_quadratic_schedule`` of diffusers' pipelines (LTX-Video from 0.9.7 on, Mochi).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from qvgen.models.objectives import FlowMatching

THRESHOLD = 0.025
"""Share of the noise that the first half of the sampling steps removes: the pipelines' ``threshold_noise``."""


def linear_quadratic_level(u: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Noise level that sampling has reached after a share of its steps.

    Args:
        u: float32 [...] in [0, 1].

    Returns:
        sigma: float32 [...], from 1 to 0.

    >>> (linear_quadratic_level(torch.tensor([0.0, 0.25, 0.5, 1.0])) * 10_000).round().int().tolist()
    [10000, 9875, 9750, 0]
    """
    curve = 1 - 2 * THRESHOLD
    late = 4 * curve * u**2 - (4 - 10 * THRESHOLD) * u + curve
    return 1 - torch.where(u < 0.5, 2 * THRESHOLD * u, late)


@dataclass(frozen=True, kw_only=True)
class LinearQuadraticFlow(FlowMatching):
    """Flow matching whose draws lie as the steps of linear-quadratic sampling do.

    Attributes:
        shift: The shift that puts half of the draws above the same level, 0.975 / 0.025; draws with a shift of their own
            (``loss.level_shift``, ``loss.levels=logit_normal``) are FlowMatching's, and begin from it.
    """

    shift: float = (1 - THRESHOLD) / THRESHOLD

    def sample_sigma(self, *, generator: torch.Generator) -> Float[Tensor, ""]:
        """Draw one noise level, float32 [] in (0, 1]; half of the draws are above 0.975, as half of the steps are."""
        return linear_quadratic_level(torch.rand((), generator=generator))

    def with_shift(self, shift: float) -> FlowMatching:
        """Return plain flow matching with this shift."""
        return FlowMatching(shift=shift)
