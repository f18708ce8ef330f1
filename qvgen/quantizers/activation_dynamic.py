"""Activations on a grid that each token chooses for itself, times learned clips (QVGen release).

Every token (or group of its channels) takes its own minimum and maximum at run time, multiplied by
sigmoid(theta): one learned pair (low, high) per layer and noise band, started at 0.95. The band is that of the
sample's own timestep, so samples of one batch do not share anything.

Deviations from the released code, which chooses the band by the first sample of the batch (training) or a call counter
(sampling) and clips a second time by a constant 0.95: see docs/method.md.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from qvgen.quant.grid import Grid

INITIAL_CLIP = 0.95


class ActivationDynamic(nn.Module):
    """Learned clip factors per noise band.

    Attributes:
        clip_low: Parameter float32 [num_bands], logits of the factor on the minimum; None for symmetric grids.
        clip_high: Parameter float32 [num_bands], logits of the factor on the maximum.
    """

    clip_low: nn.Parameter | None
    clip_high: nn.Parameter

    def __init__(self, *, grid: Grid, num_bands: int) -> None:
        super().__init__()
        self.grid = grid
        logit = math.log(INITIAL_CLIP / (1.0 - INITIAL_CLIP))
        self.clip_low = None if grid.symmetric else nn.Parameter(torch.full((num_bands,), logit))
        self.clip_high = nn.Parameter(torch.full((num_bands,), logit))

    def set_bits_(self, bits: int) -> None:
        """Another width of the same grid; the clips keep their values."""
        self.grid = replace(self.grid, bits=bits)

    def clip_tables(self) -> tuple[Tensor, Tensor]:
        """Factors in (0, 1), float32 [num_bands] each: low (ones for symmetric grids) and high.

        Training gathers from the same tables that fold stores, so both see the same bits.
        """
        high = self.clip_high.float().sigmoid()
        return torch.ones_like(high) if self.clip_low is None else self.clip_low.float().sigmoid(), high

    def extra_repr(self) -> str:
        """Grid for ``print(model)``."""
        return f"{self.grid.bits} bits, {self.grid.granularity}, bands={self.clip_high.numel()}"
