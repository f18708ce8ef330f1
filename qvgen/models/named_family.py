"""A model family together with its name and the arguments that it was built with.

A family alone does not say what it was made of. Whatever has to make another one of it needs that: a plan, which tries other
sizes of clips; a packed directory, whose manifest names the model; a cache, whose key holds the arguments.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from qvgen.config.leaf_file import read_leaf
from qvgen.config.leaves import build_leaf, load_leaf
from qvgen.models.base import VideoDiT


@dataclass(frozen=True, kw_only=True)
class NamedFamily:
    """A model family, its name, and its section of a configuration.

    Attributes:
        name: The file of conf/model (or of the user's own folder) that chooses it, for example ``tiny``.
        family: The family.
        section: Plain values: ``_target_``, the class's arguments, and ``recipe`` where the file has one.

    Example:
        >>> model = NamedFamily.load("tiny", num_frames=4)
        >>> model.family.sample_shape, model.rebuild({"num_frames": 8}).sample_shape, model.recipe["steps"]
        ((3, 4, 16, 16), (3, 8, 16, 16), 220)
    """

    name: str
    family: VideoDiT
    section: Mapping[str, Any]

    @classmethod
    def load(cls, name: str, /, **changes: Any) -> Self:
        """Build the family that ``model=NAME`` chooses.

        Args:
            name: File of conf/model.
            **changes: Arguments in place of the file's values, for example ``path``.

        Raises:
            UserError: There is no such file, or the class has no such argument.
        """
        family: VideoDiT = load_leaf("model", name, **changes)
        return cls(name=name, family=family, section={**read_leaf("model", name), **changes})

    def rebuild(self, changes: Mapping[str, Any] | None = None) -> VideoDiT:
        """A new family of the same arguments: one that holds no cached tensor.

        Args:
            changes: Arguments in place of its own, for example another ``num_frames``.
        """
        spec = {key: value for key, value in self.section.items() if key != "recipe"}
        trusted = [str(spec["_target_"])]  # its class was followed before, when this family was built
        rebuilt: VideoDiT = build_leaf({**spec, **(changes or {})}, key="model", trusted=trusted)
        return rebuilt

    @property
    def recipe(self) -> Mapping[str, Any]:
        """Steps, batch size and rates of the model's published training; empty where the file has none."""
        return self.section.get("recipe") or {}
