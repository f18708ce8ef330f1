"""Open-Sora's objective: flow matching with a shift of noise levels that grows with the size of a clip."""

from __future__ import annotations

from dataclasses import dataclass

from qvgen.models.objectives import FlowMatching


@dataclass(frozen=True, kw_only=True)
class ResolutionFlow(FlowMatching):
    """Flow matching whose shift is that of a clip's size; small clips have one below 1.

    Raises:
        ValueError: A shift that is not above 0.
    """

    def __post_init__(self) -> None:
        if not self.shift > 0:
            raise ValueError(f"shift={self.shift} is not above 0; 1 draws noise levels uniformly")
