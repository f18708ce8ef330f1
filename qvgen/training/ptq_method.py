"""A PTQ method as a run uses it: the method, its name, and what it is calibrated by."""

from __future__ import annotations

from dataclasses import dataclass

from qvgen.config.sections import CalibrationConfig
from qvgen.initializers.base import Initializer


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
