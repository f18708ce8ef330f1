"""A suite: the metrics that an evaluation measures, by their names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Suite:
    """A list of metrics.

    Attributes:
        metrics: Names of files in conf/metric, in the order of the table.
    """

    metrics: Sequence[str]

    def __post_init__(self) -> None:
        if not self.metrics:
            raise ValueError("suite.metrics=[] is empty; write for example suite.metrics=[psnr,ssim]")
        for name in self.metrics:
            if list(self.metrics).count(name) > 1:
                raise ValueError(f"suite.metrics names {name} twice; leave one out")
