"""Layers in groups by what they do (ViDiT-Q, arXiv 2406.02540): every quantized layer belongs to exactly one.

A family names its groups by patterns (``VideoDiT.layer_groups``); a layer that none matches is in ``other``. Inside a group a
*unit* is what one block of the transformer holds of it: ``blocks.7`` of ``blocks.7.attn2.to_q``, and for layers outside of
the blocks their first name (``condition_embedder``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

GROUPS = ("cross_attention", "temporal_attention", "self_attention", "ffn", "other")


@dataclass(frozen=True, kw_only=True)
class LayerUnit:
    """The layers of one group in one block.

    Attributes:
        group: One of :data:`GROUPS`.
        block: Name of the block.
        layers: Names of its layers, in the model's order.
    """

    group: str
    block: str
    layers: tuple[str, ...]

    @property
    def name(self) -> str:
        """Name of the unit in tables."""
        return f"{self.group}:{self.block}"

    @property
    def module(self) -> str:
        """The innermost module that holds all its layers: an attention, for example."""
        paths = [name.split(".")[:-1] for name in self.layers]
        shared = []
        for parts in zip(*paths, strict=False):
            if len(set(parts)) > 1:
                break
            shared.append(parts[0])
        return ".".join(shared)


def block_of(name: str) -> str:
    """The block that a layer is in.

    >>> block_of("transformer_blocks.3.attn1.to_out.0"), block_of("proj_out")
    ('transformer_blocks.3', 'proj_out')
    """
    parts = name.split(".")
    numbers = [index for index, part in enumerate(parts) if part.isdigit()]
    first = numbers[0] if numbers and numbers[0] < len(parts) - 1 else 0
    return ".".join(parts[: first + 1])


def group_of(name: str, patterns: Mapping[str, Sequence[str]]) -> str:
    """The group of a layer.

    Raises:
        ValueError: Patterns of two groups match it.
    """
    found = [group for group, entries in patterns.items() if any(fnmatchcase(name, entry) for entry in entries)]
    if len(found) > 1:
        raise ValueError(
            f"{name} is in the groups {' and '.join(found)}; let the patterns of layer_groups exclude each other"
        )
    return found[0] if found else "other"


def layer_units(names: Sequence[str], patterns: Mapping[str, Sequence[str]]) -> tuple[LayerUnit, ...]:
    """Cut layers into units.

    Args:
        names: Quantized layers, in the model's order.
        patterns: group -> fnmatch patterns.

    Returns:
        Units that hold every name once, in the order of :data:`GROUPS` and then of the model.

    Raises:
        ValueError: An unknown group, or a layer in two.
    """
    for group in patterns:
        if group not in GROUPS[:-1]:
            raise ValueError(f"layer_groups holds {group!r}; there are {', '.join(GROUPS[:-1])}")
    units: dict[tuple[str, str], list[str]] = {}
    for name in names:
        units.setdefault((group_of(name, patterns), block_of(name)), []).append(name)
    ordered = sorted(units, key=lambda key: GROUPS.index(key[0]))
    return tuple(LayerUnit(group=group, block=block, layers=tuple(units[group, block])) for group, block in ordered)
