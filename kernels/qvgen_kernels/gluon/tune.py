"""The Gluon kernel's side of measuring tiles (qvgen_kernels.triton.tune): which there are, and a call with one."""

from __future__ import annotations

from qvgen_kernels.contract import LinearSpec
from qvgen_kernels.gluon.tile import KERNEL, OUTPUTS, WARPS, fits, rule
from qvgen_kernels.triton.backend import Product
from qvgen_kernels.triton.tiles import Card
from qvgen_kernels.triton.tune import TunedKernel
from qvgen_kernels.triton.tuned import Tile

__all__ = ["GLUON", "candidates"]


def candidates(spec: LinearSpec, *, rows: int, card: Card, tail: bool) -> list[Tile]:
    """Tiles to be measured, the rule's first: 64 to 256 rows, no wider than the call, and 3 stages up to all that fit."""
    first = rule(spec, rows=rows, card=card, tail=tail)
    found = [Tile(OUTPUTS, wide, WARPS, stages) for wide in (64, 128, 256) for stages in range(3, 7)]
    return [first, *(tile for tile in found if fits(tile) and tile != first and tile.rows < 2 * max(rows, 64))]


def _multiply(product: Product, tile: Tile, card: Card) -> None:
    from qvgen_kernels.gluon.gemm import run_product

    run_product(product, tile, programs=card.processors)


GLUON = TunedKernel(name=KERNEL, candidates=candidates, bytewise=True, multiply=_multiply)
