"""Activations on a grid that each token chooses for itself, times learned clips (QVGen release).

Every token (or group of its channels) takes its own minimum and maximum at run time, multiplied by
sigmoid(theta): one learned pair (low, high) per layer and noise band, started at :func:`initial_clip`. The band is of the
sample's own timestep, so samples of one batch do not share anything.

Deviations from the released code, which chooses the band by the first sample of the batch (training) or a call counter
(sampling) and clips a second time by a constant 0.95: see docs/method.md.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from qvgen.quant.grid import Grid

_INITIAL_CLIPS = {2: 0.95, 3: 0.95, 4: 0.98, 5: 0.995}
_WIDE_CLIP = 0.999


def initial_clip(bits: int) -> float:
    """Share of a token's range that a grid starts with: the release's 0.95 up to 3 bits, nearly all of it from 6 bits on.

    With few levels a smaller step is worth the clipped values; with many it is not: on the small model, 0.95 in place of
    0.999 makes the error of W8A8 28 times larger (.00335, .00012), and at 3 bits a hundredth smaller (.2048, .2065).
    """
    return _INITIAL_CLIPS.get(bits, _WIDE_CLIP)


class ActivationDynamic(nn.Module):
    """Learned clip factors per noise band.

    Attributes:
        clip_low: Parameter float32 [num_bands], logits of the factor on the minimum; None for symmetric grids.
        clip_high: Parameter float32 [num_bands], logits of the factor on the maximum; None for grids without clips.
    """

    clip_low: nn.Parameter | None
    clip_high: nn.Parameter | None

    def __init__(self, *, grid: Grid, num_bands: int) -> None:
        super().__init__()
        self.grid = grid
        logits = torch.full((num_bands,), _logit(initial_clip(grid.bits)))
        self.clip_low = nn.Parameter(logits.clone()) if grid.clip and not grid.symmetric else None
        self.clip_high = nn.Parameter(logits) if grid.clip else None

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
