"""Tiles of the Gluon kernel: 128 outputs, 64 to 256 rows, chunks of 128 columns, as many stages as fit.

The rule, of which nothing was timed: 256 rows, 128 where a function, gate or residual needs registers too; halved while half
of them would hold the call, or while there are fewer tiles than processors, down to 64.
"""

from __future__ import annotations

from functools import lru_cache

from qvgen_kernels.contract import LinearSpec
from qvgen_kernels.triton.tiles import Card
from qvgen_kernels.triton.tuned import Tile, nearest, say_where_bf16_wins, tuned_tiles

__all__ = ["CHUNK", "KERNEL", "WARPS", "fits", "forget", "rule", "tile_of"]

KERNEL = "gluon"
CHUNK, WARPS, OUTPUTS = 128, 8, 128
MOST_STAGES = 6

MEMORY = 227 << 10
"""Bytes of shared memory that a program may take."""
EPILOGUE = 33 << 10
"""Bytes of shared memory in which sums change their order, and of barriers."""


def _stages(rows: int) -> int:
    return min(MOST_STAGES, (MEMORY - EPILOGUE) // (CHUNK * (OUTPUTS + rows)))


def fits(tile: Tile) -> bool:
    """Whether the kernel has such a tile."""
    own = (tile.outputs, tile.warps) == (OUTPUTS, WARPS) and tile.rows in (64, 128, 256)
    return own and 2 <= tile.stages <= _stages(tile.rows)


def rule(spec: LinearSpec, *, rows: int, card: Card, tail: bool = False) -> Tile:
    """The tile that was not measured; arguments as :func:`tile_of`."""
    wide = 128 if tail or spec.function != "none" else 256
    over_n = -(-spec.out_features // OUTPUTS)
    while wide > 64 and (wide // 2 >= rows or -(-rows // wide) * over_n < card.processors):
        wide //= 2
    return Tile(OUTPUTS, wide, WARPS, _stages(wide))


@lru_cache(maxsize=4096)
def tile_of(spec: LinearSpec, *, rows: int, card: Card, tail: bool = False) -> Tile:
    """The tile of a call: a measured one, else the rule's.

    Args:
        spec: The layer.
        rows: M > 0.
        card: Where it runs.
        tail: Whether there is a gate or a residual.
    """
    tail = tail or spec.function != "none"
    entry = nearest(tuned_tiles(card.name), spec, rows=rows, tail=tail, kernel=KERNEL) if card.name else None
    if entry is not None:
        say_where_bf16_wins(entry)
        if fits(entry.tile):
            return entry.tile
    return rule(spec, rows=rows, card=card, tail=tail)


def forget() -> None:
    """Look at the tables of measured tiles anew at the next call."""
    tile_of.cache_clear()
