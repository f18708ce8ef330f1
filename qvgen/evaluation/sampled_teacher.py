"""The full-precision model of a run as calibration and measurements see it: something that samples videos."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from qvgen.models.base import Encode, VideoDiT
from qvgen.models.named_family import NamedFamily


@dataclass(frozen=True, kw_only=True, eq=False)
class SampledTeacher:
    """A full-precision model and what sampling with it needs.

    Attributes:
        model: Its family, with name and arguments.
        transformer: The model itself, in eval mode; it is as it was after everything that is done with it.
        encode: Turns captions into conditions, for example ``family.encode``.
        seed: The run's seed; every purpose adds an offset of its own, so that its videos have other noise.
    """

    model: NamedFamily
    transformer: nn.Module
    encode: Encode
    seed: int

    @property
    def family(self) -> VideoDiT:
        """The model family."""
        return self.model.family
