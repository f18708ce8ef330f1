"""The limits of a runtime: what other people's kernels have, as the profile that is for them says it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from qvgen.config.plain_json import items, mapping, text, whole

Addition = Literal["rotation", "smoothing", "branch", "static", "widths", "attention"]
"""Things that a method can add to a layer: a rotation that the profile does not have, a vector that inputs are multiplied
by, a low-rank branch in floating point, ranges from a table, widths that differ between layers or change over sampling;
and attention in 8 bits, which a profile adds to the model."""


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """The limits of a runtime, which are not ours to move.

    Attributes:
        name: How people call it.
        weight_bits: Widths of codes that its weights can hold.
        activation_bits: Widths to which it quantizes inputs.
        additions: What its layers may have besides grids and the profile's rotation.
        scale_dtypes: Precisions of scales that it takes in place of each other; a scale whose own is another one keeps that.
    """

    name: str
    weight_bits: tuple[int, ...]
    activation_bits: tuple[int, ...]
    additions: frozenset[Addition] = frozenset()
    scale_dtypes: tuple[str, ...] = ()

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Runtime:
        """Read the section ``runtime`` of a file of conf/profile.

        Raises:
            ValueError: A key or a value that is not what this class says.
        """
        keys = ("name", "weight_bits", "activation_bits", "additions", "scale_dtypes")
        if unknown := sorted(set(data) - set(keys)):
            raise ValueError(f"runtime has no {unknown[0]!r}; it says {', '.join(keys)}")
        additions = items(data.get("additions", []), "additions")
        if bad := [name for name in additions if name not in get_args(Addition)]:
            raise ValueError(f"additions={bad[0]!r} of runtime is unknown; use of {', '.join(get_args(Addition))}")
        widths = {
            key: tuple(whole(bits, key, low=2, high=8) for bits in items(mapping(data, "runtime")[key], key))
            for key in ("weight_bits", "activation_bits")
        }
        dtypes = tuple(text(name, "scale_dtypes") for name in items(data.get("scale_dtypes", []), "scale_dtypes"))
        return cls(name=text(data["name"], "name"), additions=frozenset(additions), scale_dtypes=dtypes, **widths)

    def has(self, weight_bits: int, activation_bits: int) -> bool:
        """Whether it runs these widths."""
        return weight_bits in self.weight_bits and activation_bits in self.activation_bits
