"""Activations on a grid that each token chooses for itself, times learned clips (QVGen release).

Every token (or group of its channels) takes its own minimum and maximum at run time, multiplied by
sigmoid(theta): one learned pair (low, high) per layer and noise band, started by the layer's width or its inputs
(:mod:`qvgen.quant.clip_start`). The band is of the sample's own timestep, so samples of one batch do not share anything.

Where tokens have timesteps of their own (Wan2.2 TI2V from an image: 0 for the clean first frame, t for all others), the
sample is in the band of t with all of its tokens, those of the clean frame too. From the first attention on they hold what
they read in the noisy tokens, and training and sampling alike show them to a layer beside tokens of t. In the band of 0 they
would pull at factors that are there for samples which are clean as a whole, in every step.

Deviations from the released code, which chooses the band by the first sample of the batch (training) or a call counter
(sampling) and clips a second time by a constant 0.95: see docs/method.md.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from qvgen.quant.grid import Grid


class ActivationDynamic(nn.Module):
    """Learned clip factors per noise band.

    Args:
        grid: Grid of the activations.
        num_bands: Noise bands.
        start: Both factors of all bands, in (0, 1).

    Attributes:
        clip_low: Parameter float32 [num_bands], logits of the factor on the minimum; None for symmetric grids.
        clip_high: Parameter float32 [num_bands], logits of the factor on the maximum; None for grids without clips.
    """

    clip_low: nn.Parameter | None
    clip_high: nn.Parameter | None

    def __init__(self, *, grid: Grid, num_bands: int, start: float) -> None:
        super().__init__()
        self.grid = grid
        logits = torch.full((num_bands,), _logit(start))
        self.clip_low = nn.Parameter(logits.clone()) if grid.clip and not grid.symmetric else None
        self.clip_high = nn.Parameter(logits) if grid.clip else None

    @torch.no_grad()
    def start_from_(self, low: float, high: float) -> None:
        """Take over factors in (0, 1) for all bands; an end that the grid does not cut keeps its range."""
        for logits, share in ((self.clip_low, low), (self.clip_high, high)):
            if logits is not None:
                logits.fill_(_logit(share))

    def tables(self) -> tuple[Tensor | None, Tensor | None]:
        """Factors in (0, 1), float32 [num_bands] each: low and high; None where ranges are not cut.

        Training gathers from the same tables that fold stores, so both see the same bits.
        """
        low, high = (None if logits is None else logits.float().sigmoid() for logits in (self.clip_low, self.clip_high))
        return low, high

    def extra_repr(self) -> str:
        """Grid for ``print(model)``."""
        bands = "no clips" if self.clip_high is None else f"bands={self.clip_high.numel()}"
        return f"{self.grid.bits} bits, {self.grid.granularity}, {bands}"


def _logit(share: float) -> float:
    return math.log(share / (1.0 - share))
