"""Q-DM (NeurIPS 2023): distillation in the space of the noise, with inputs that are quantized by their noise level.

    loss = mean |eps_student - eps_teacher|^2        eps: the noise that a prediction implies (noise-estimating mimicking)

With flow matching that is the distance of velocities times (1 - sigma)^2, with v-prediction times abar_t: the same target as
distillation, but errors at high noise, which the sampler's later steps correct, count less. The second part of the paper,
timestep-aware quantization of activations, is what every method has here: ranges of inputs are learned for each noise band
of the sample's own timestep (:mod:`qvgen.quantizers.activation_dynamic`).

Left out: the paper normalizes queries and keys of a U-Net by statistics of the timestep before one range for all of them;
ranges of single tokens need no such statistics.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qvgen.methods.base import CaptionDropout, Compared, Method


@dataclass(frozen=True, kw_only=True)
class QDM(Method):
    """Learned scales and zero points, straight-through rounding, and the teacher's noise estimate as the target.

    Attributes:
        caption_dropout, share_activations: See :class:`qvgen.methods.base.Method`.
    """

    compares: ClassVar[Compared] = "noise"
    caption_dropout: CaptionDropout = 0.05
    share_activations: bool = True

    @property
    def needs_teacher(self) -> bool:
        """The target is the teacher's noise estimate."""
        return True
