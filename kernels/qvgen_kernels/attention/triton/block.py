"""Scores of a tile of queries and a block of keys to probabilities (kernels/attention.md, steps 3, 4 and 6).

Where the contract fuses a product and a sum, so does this. Elsewhere every line is one float32 operation; where a
multiply-add stands for two, its product is exact, being one with a power of two, so that the sum is rounded as if it stood
alone. Vectors of queries stand in whatever direction a tile has them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from qvgen_kernels.attention.contract import BLOCK, EXP2, EXP2_FINE, FLUSHED, REACH, SLACK, SPAN
from qvgen_kernels.triton.rounding import MAGIC

__all__ = [
    "ROWS",
    "SMALLEST",
    "block_exponent",
    "constant",
    "dropped",
    "eleven_bits",
    "probability_factors",
    "reach",
    "seen_keys",
]

ROWS = 64
"""Queries of a program: 16 of each warp, which holds all scores of its queries with a block."""

SMALLEST = tl.constexpr(-3.4028234663852886e38)
"""An exponent that stands for -inf."""

_BLOCK, _ROWS = tl.constexpr(BLOCK), tl.constexpr(ROWS)
_C0, _C1, _C2 = (tl.constexpr(value) for value in EXP2)
_F0, _F1, _F2, _F3 = (tl.constexpr(value) for value in EXP2_FINE)
_STEP = tl.constexpr(0.5 / SPAN)
_SLACK = tl.constexpr(SLACK)
_REACH = tl.constexpr(REACH)
_FLUSHED = tl.constexpr(FLUSHED)


@triton.jit
def constant(value, like):
    """A number as a tensor of the shape of another one, for Triton's fma."""
    return tl.full(like.shape, value, tl.float32)


@triton.jit
def block_exponent(largest, slope):
    """The exponent of a block by its largest product of score and scale: part is -1/32 of the contract's x, no bit less."""
    part = largest * slope
    above = tl.fma(tl.abs(part), constant(_SLACK / _STEP, part), constant(0.5, part))
    return (tl.fma(part, constant(-1.0 / _STEP, part), above) + MAGIC) - MAGIC


@triton.jit
def reach(z):
    """2^z of whole numbers z <= 0, but no less than 2^-64."""
    return ((tl.maximum(z, -_REACH) + (MAGIC + 127.0)).to(tl.int32, bitcast=True) << 23).to(tl.float32, bitcast=True)


@triton.jit
def dropped(v):
    """Rescaled sums; 0 in place of those that have become small."""
    return tl.where(tl.abs(v) < _FLUSHED, 0.0, v)


@triton.jit
def probability_factors(z, slope, exponent, plain: tl.constexpr):
    """The two factors of a block's probabilities before their rounding: powers of two with a mantissa, and the quotient.

    Args:
        z: Scores times keys' scales, -inf where a key is hidden.
        slope: Factors of queries times -1/32, of a shape that z broadcasts with.
        exponent: Exponents of the block, likewise.
        plain: Whether values are.
    """
    start = exponent * _STEP + 0.5
    below = tl.fma(z, tl.broadcast_to(slope, z.shape), tl.broadcast_to(start, z.shape))
    # From 1/2 to 1; to clamp at 0 as well is no instruction of its own on a card.
    largest: tl.constexpr = 0x37000000 if plain else 0x33800000
    bits = largest - (tl.clamp(below, 0.0, 1.0).to(tl.int32, bitcast=True) << 4)
    g = ((bits & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True)
    if plain:
        q = tl.fma(tl.fma(g, constant(_F3, g), constant(_F2, g)), g, constant(_F1, g))
        q = tl.fma(q, g, constant(_F0, g))
    else:
        q = tl.fma(tl.fma(g, constant(_C2, g), constant(_C1, g)), g, constant(_C0, g))
    return bits.to(tl.float32, bitcast=True), q


@triton.jit
def eleven_bits(v):
    """Float32 numbers of 11 bits, nearest, halves to even: those that TF32 holds."""
    bits = v.to(tl.int32, bitcast=True)
    bits = (
        bits + 0xFFF + ((bits >> 13) & 1)
    ) & -0x2000  # an infinity stays; a NaN need not, its rows are NaN in the end
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def seen_keys(t, place, index, step, sizes, form: tl.constexpr):
    """Which keys of a block a query sees: bool [rows or 1, keys].

    Args:
        t: Has the mask.
        place: Head, queries, and the mask's offset at the first of the 64 queries that these are of.
        index: The block's, counted over all heads.
        step: Keys of the block, [1, keys].
        sizes: Sizes of the call.
        form: Constants of the kernel.
    """
    head, row, start = place
    first = (index - head * sizes.blocks) * _BLOCK
    seen = step < (sizes.keys - first).to(tl.int32)
    # Far offsets are one number of 64 bits; those inside of the tile are small (attend_arguments).
    if form.mask == "keys":
        mask = t.mask + start + first * sizes.mask_key + step * sizes.mask_key
        seen = tl.load(mask, mask=seen, other=0) != 0
    elif form.mask == "all":
        inside = seen & (row < sizes.queries)[:, None]
        place = (row % _ROWS)[:, None] * sizes.mask_query + step * sizes.mask_key
        seen = tl.load(t.mask + start + first * sizes.mask_key + place, mask=inside, other=0) != 0
    return seen
