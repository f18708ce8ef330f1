"""A PTQ method as a run uses it: the method, its name, and what it is calibrated by."""

from __future__ import annotations

from dataclasses import dataclass

from qvgen.config.schema.sections import CalibrationConfig
from qvgen.initializers.base import Initializer, Need
from qvgen.initializers.clip_search import needs_with_inputs
from qvgen.quant.grid import Profile


@dataclass(frozen=True, kw_only=True)
class PTQMethod:
    """A PTQ method, and the videos by which it sees the full-precision model.

    Attributes:
        name: The file of conf/init that chooses it, for messages and records, for example ``gptq``.
        init: The method.
        calibration: What is sampled for a method that needs statistics; without prompts the model's own captions.
    """

    name: str
    init: Initializer
    calibration: CalibrationConfig

    @property
    def searches_clips(self) -> bool:
        """Whether clips of inputs start where sampled inputs lose least, and not where a table says."""
        return self.calibration.clips == "search" or (self.calibration.clips == "auto" and bool(self.init.needs))

    def needs(self, profile: Profile) -> frozenset[Need]:
        """What is sampled: what the method needs, and inputs where clips are searched; empty: nothing is."""
        return needs_with_inputs(self.init.needs, profile, is_searched=self.searches_clips)
