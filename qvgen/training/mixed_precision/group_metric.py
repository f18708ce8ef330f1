"""Which metrics belong to which group of layers, as ``init=vidit_q_mp`` is configured, with their networks loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Self

from qvgen.evaluation.damage import Damage, motion_damage, text_damage, visual_damage
from qvgen.initializers.bit_budget import BitBudget

ATTENTION = "attention output"
"""The substitute for text similarity: relative change of the cross-attention's output on the full-precision model's calls."""

OUTPUT = "output error"


@dataclass(frozen=True, kw_only=True)
class GroupMetrics:
    """The groups' own metrics.

    Attributes:
        of: group -> name in tables -> a distance of videos; None where no video is needed.
    """

    of: Mapping[str, Mapping[str, Damage | None]]

    @property
    def names(self) -> dict[str, str]:
        """Group -> its metrics' names in words."""
        return {group: " + ".join(metrics) for group, metrics in self.of.items()}

    @property
    def keys(self) -> dict[str, list[str]]:
        """Group -> what decides the values of its metrics."""
        return {
            group: [damage.key if damage else name for name, damage in metrics.items()]
            for group, metrics in self.of.items()
        }

    @classmethod
    def load(cls, init: BitBudget, groups: Sequence[str]) -> Self:
        """Load the networks that the groups need.

        Raises:
            UserError: One was not fetched.
            ValueError: A folder holds no text-image model.
        """
        makers: dict[str, Callable[[], Damage | None]] = {
            "visual": lambda: visual_damage(init.visual),
            "motion": lambda: motion_damage(init.motion),
            "text": lambda: None if init.text is None else text_damage(init.text),
            "output": lambda: None,
        }
        kinds = {group: init.metrics_of(group) for group in groups}
        made = {kind: makers[kind]() for kind in dict.fromkeys(chain.from_iterable(kinds.values()))}
        plain = {"text": ATTENTION, "output": OUTPUT}
        names = {kind: damage.name if damage else plain[kind] for kind, damage in made.items()}
        return cls(of={group: {names[kind]: made[kind] for kind in of} for group, of in kinds.items()})
