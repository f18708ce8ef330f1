"""Which metric belongs to which group of layers, as ``init=vidit_q_mp`` is configured, with its network loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

from qvgen.evaluation.damage import Damage, motion_damage, text_damage, visual_damage
from qvgen.initializers.mixed_precision import MixedPrecision

ATTENTION = "attention output"
"""The substitute for text similarity: relative change of the cross-attention's output on the full-precision model's calls."""

OUTPUT = "output error"


@dataclass(frozen=True, kw_only=True)
class GroupMetrics:
    """The groups' own metrics.

    Attributes:
        damages: group -> a distance of videos; None where no video is needed.
        names: group -> its name in tables.
    """

    damages: Mapping[str, Damage | None]
    names: Mapping[str, str]

    @classmethod
    def load(cls, init: MixedPrecision, groups: Sequence[str]) -> Self:
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
        kinds = {group: init.metric(group) for group in groups}
        made = {kind: makers[kind]() for kind in dict.fromkeys(kinds.values())}
        plain = {"text": ATTENTION, "output": OUTPUT}
        names = {group: damage.name if (damage := made[kind]) else plain[kind] for group, kind in kinds.items()}
        return cls(damages={group: made[kind] for group, kind in kinds.items()}, names=names)
