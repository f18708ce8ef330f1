"""A dimension of VBench as its own program measures it: what is said of it is ours, the value comes from over there."""

from __future__ import annotations

import json

from qvgen.evaluation.metrics.base import Pair
from qvgen.evaluation.vbench.dimension import Dimension
from qvgen.evaluation.vbench_program.program import VBenchProgram


class ProgramDimension(Dimension):
    """A dimension in the place of ours of that name.

    Args:
        ours: The dimension as qvgen has it.
        program: The program that measures it.
    """

    def __init__(self, ours: Dimension, program: VBenchProgram) -> None:
        self.name, self.asks_for, self.title, self.blind_to = ours.name, ours.asks_for, ours.title, ours.blind_to
        self.unit, self.low, self.high, self.better = ours.unit, ours.low, ours.high, ours.better
        self.source = f"{ours.source}; measured by its own program, vbench {program.facts['vbench']}"
        self._program = program

    def absent(self) -> None:
        """The program is there; whether a dimension's weights are, it says itself."""

    def key(self) -> str:
        """The class, the name, and what the environment has."""
        kind = f"{type(self).__module__}.{type(self).__qualname__}"
        return json.dumps([kind, self.name, dict(self._program.facts)], sort_keys=True)

    def weight_facts(self) -> list[dict[str, str]]:
        """The packages that decide its values; their weights are the program's own."""
        return [{"package": name, "version": version} for name, version in self._program.facts.items() if version]

    def measure(self, pair: Pair) -> float:
        """Never asked for: the program measures all videos at once."""
        raise AssertionError(f"{self.name} of {pair.caption!r} is measured by VBench's program")
