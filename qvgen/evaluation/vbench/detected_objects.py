"""The base of the four dimensions that need GRiT's detector, which is not built here.

VBench's own program measures them (``vbench.python=PATH``, :mod:`qvgen.evaluation.vbench_program`); without it each is
skipped with this reason.
"""

from __future__ import annotations

from typing import ClassVar

from qvgen.evaluation.metrics.base import Pair
from qvgen.evaluation.vbench.dimension import Dimension


class DetectorDimension(Dimension):
    """A dimension of what a detector of objects sees in 16 frames."""

    sampling: ClassVar[str] = "16, the middle one of each sixteenth"
    asks_for = True
    high = 1.0
    blind_to = ("frozen",)

    def absent(self) -> str:
        """Why it can't be measured by qvgen itself."""
        return (
            "it needs the detector GRiT, which is not built here; vbench.python=ENV/bin/python measures it by VBench's own "
            "program"
        )

    def measure(self, pair: Pair) -> float:
        """Never asked for, since it is absent."""
        raise NotImplementedError(f"{self.name} of {pair.caption!r}: {self.absent()}")
