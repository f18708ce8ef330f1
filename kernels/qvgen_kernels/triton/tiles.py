"""The tile that a program of the product computes: one that was measured (tuned.py), else a rule over card, shape and bits.

The rule, of which nothing was timed yet. A card's family has a largest tile (:data:`LARGEST`). Layers with groups hold
float32 sums beside the int32 ones and take at most 128 rows, 64 where sums are corrected by zero points; a function, gate or
residual needs registers too, and at most 128 rows leave them. A tile is no wider than the call: it is halved in rows while
half of it would hold all rows, and so are its outputs. Then, while there are fewer tiles than processors, the longer side is
halved, down to 64. Of chunks of columns as many are in flight as fit the card's shared memory, at most 3, one fewer than
stages. A measured tile whose chunks would not fit gives way to the rule.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from qvgen_kernels.contract import LinearSpec
from qvgen_kernels.triton import tuned
from qvgen_kernels.triton.layout import layout_of, unsigned_activations
from qvgen_kernels.triton.tuned import Tile, nearest, say_where_bf16_wins, tuned_tiles

__all__ = ["Card", "Tile", "fits_card", "forget", "rule", "tile_of"]


@dataclass(frozen=True)
class Card:
    """The facts of a card that the rule asks for.

    Attributes:
        capability: Compute capability; (0, 0) of a card that is not NVIDIA's.
        processors: Streaming multiprocessors.
        name: Its name, by which measured tiles are found; empty: there are none.
    """

    capability: tuple[int, int]
    processors: int
    name: str = ""


@dataclass(frozen=True)
class _Family:
    """Cards of one kind: their largest tile, and bytes of shared memory that a program may take."""

    outputs: int
    rows: int
    memory: int


LARGEST = {
    (0, 0): _Family(128, 128, 64 << 10),
    (8, 0): _Family(128, 128, 160 << 10),
    (8, 6): _Family(128, 128, 99 << 10),
    (8, 7): _Family(128, 128, 160 << 10),
    (8, 9): _Family(128, 128, 99 << 10),
    (9, 0): _Family(128, 256, 192 << 10),
    (10, 0): _Family(128, 128, 192 << 10),
    (12, 0): _Family(128, 128, 99 << 10),
}
"""By compute capability; another one takes the nearest below it."""

_SMALLEST = 64


@lru_cache(maxsize=4096)
def tile_of(spec: LinearSpec, *, rows: int, card: Card, tail: bool = False) -> Tile:
    """The tile of a call.

    Args:
        spec: The layer.
        rows: M > 0.
        card: Where it runs.
        tail: Whether there is a gate or a residual.
    """
    entry = (
        nearest(tuned_tiles(card.name), spec, rows=rows, tail=tail or spec.function != "none") if card.name else None
    )
    if entry is not None:
        say_where_bf16_wins(entry)
        if fits_card(entry.tile, spec, card=card):
            return entry.tile
    return rule(spec, rows=rows, card=card, tail=tail)


def rule(spec: LinearSpec, *, rows: int, card: Card, tail: bool = False) -> Tile:
    """The tile that was not measured; arguments as :func:`tile_of`."""
    family = _family(card)
    tall, wide = family.outputs, family.rows
    if tail or spec.function != "none":
        wide = min(wide, 128)
    if spec.num_groups > 1:
        wide = 128 if spec.weight_zero_point == "none" and not unsigned_activations(spec) else 64
    while wide > 16 and wide // 2 >= rows:
        wide //= 2
    while tall > _SMALLEST and tall // 2 >= spec.out_features:
        tall //= 2
    while -(-rows // wide) * -(-spec.out_features // tall) < card.processors and max(tall, wide) > _SMALLEST:
        tall, wide = (tall, wide // 2) if wide >= tall else (tall // 2, wide)
    stages = max(2, min(4, 1 + family.memory // _stage_bytes(spec, tall, wide)))
    return Tile(tall, wide, 8 if tall * wide >= 128 * 128 else 4, stages)


def fits_card(tile: Tile, spec: LinearSpec, *, card: Card) -> bool:
    """Whether the chunks in flight of a tile fit the card's shared memory."""
    return (tile.stages - 1) * _stage_bytes(spec, tile.outputs, tile.rows) <= _family(card).memory


def _stage_bytes(spec: LinearSpec, outputs: int, rows: int) -> int:
    layout = layout_of(spec)
    return rows * layout.fields * layout.width + outputs * layout.chunk_bytes


def _family(card: Card) -> _Family:
    return LARGEST[max(known for known in LARGEST if known <= card.capability)]


def forget() -> None:
    """Read the tables of measured tiles anew at the next call."""
    tuned.forget()
    tile_of.cache_clear()
