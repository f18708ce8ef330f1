"""How far the quantized transformer's output is from the reference's, at the noise levels of one band.

    sum |v - v_ref|^2 / sum |v_ref|^2      over the calls of one video's sampling whose timestep is in [from, to)

The calls are those that the reference model makes while it samples the video, with guidance both with and without caption;
the quantized one gets the very same input each time, so no error adds up from step to step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from qvgen.config.schema.value_range import Range
from qvgen.evaluation.distance import RelativeError
from qvgen.evaluation.metrics.base import ComparedCall, ModelMetric


class PredictionError(ModelMetric):
    """Relative error of the transformer in a band of noise; smaller is closer to the reference.

    Args:
        band: First timestep of the band, and the first one behind it; 0 is no noise, 1000 is noise alone.
        videos: Number of videos whose sampling is recorded: the first of each prompt, then the second of each.
    """

    source = "relative error of the transformer's output on the inputs of the reference's own sampling"
    better = "lower"

    def __init__(self, *, band: Sequence[float], videos: Annotated[int, Range("> 0")]) -> None:
        if len(band) != 2 or not band[0] < band[1]:
            raise ValueError(f"band={list(band)} is no band; write for example [0, 333]")
        if videos < 1:
            raise ValueError(f"videos={videos} must be 1 or more")
        self.band, self.videos = (float(band[0]), float(band[1])), videos
        self.title = f"prediction error, timestep {band[0]:g}..{min(1000, band[1]):g}"

    def measure(self, calls: Sequence[ComparedCall]) -> float | None:
        """See the module."""
        first, last = self.band
        error, found = RelativeError(), False
        for call in calls:
            if first <= call.timestep < last:
                error.update(call.output, call.reference)
                found = True
        return error.compute() if found else None
