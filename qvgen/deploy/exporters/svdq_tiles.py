"""The order of bytes of SVDQuant's W4A4 kernels (Nunchaku, cache-dit, nunchaku_lite): tiles of one warp of 32 lanes.

A weight [N, K] is cut into tiles of 128 rows and 64 columns. Within a tile, row n and column k are

    n = 16 p + 8 a + i        p in 0..7, a in 0..1, i in 0..7 (the lane's row)
    k = 32 b + 8 j + c        b in 0..1, j in 0..3 (the lane's column), c in 0..7

and codes are stored in the order (row tile, column tile, p, i, j, a, b, c), c fastest: 8 codes of 4 bits are one 32-bit
register, the smaller c in the lower bits. A lane 4 i + j so reads its four registers of a 16 x 64 fragment at once.

    scales [N, G]     within a row tile n = 16 t + 8 u + 2 v + w (t in 0..7, u in 0..1, v in 0..3, w in 0..1), stored in the
                      order (row tile, group, t, v, u, w); a vector (bias, smoothing) is one group
    branch [R, K]     fragments of 16 x 16: rank 8 a + i, column 8 b + 2 j + c (a, b, c in 0..1), stored in the order
                      (column fragment, rank fragment, i, j, a, b, c); the upper half [N, R] alike, with its rows as columns'
                      fragments and ranks as fragments' columns

The layout is public in Nunchaku's and cache-dit's packers; a test holds this file to cache-dit's byte for byte.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from qvgen.deploy.exporters.nibbles import pack_signed_nibbles, unpack_signed_nibbles

TILE = 128
"""Rows of a tile of weights, and the multiple to which rows and columns are padded."""
GROUP = 64
"""Columns of a group and of a tile."""
FRAGMENT = 16
"""Side of a fragment of the branch, and the multiple of its rank."""

_WEIGHT_ORDER = (0, 4, 1, 3, 6, 2, 5, 7)
_SCALE_ORDER = (0, 5, 1, 3, 2, 4)
_BRANCH_ORDER = (0, 1, 3, 5, 2, 4, 6)


def padded(size: int, multiple: int = TILE) -> int:
    """A size, made a multiple."""
    return -(-size // multiple) * multiple


def pad_matrix(matrix: Tensor, rows: int, columns: int, *, value: float = 0.0) -> Tensor:
    """A matrix with further rows and columns that hold a value."""
    return functional.pad(matrix, (0, columns - matrix.shape[1], 0, rows - matrix.shape[0]), value=value)


def pack_weight(codes: Tensor) -> Tensor:
    """Codes int8 [N, K] of -8..7 as int8 [N, K / 2]; N and K are multiples of 128."""
    rows, columns = codes.shape
    tiles = codes.reshape(rows // TILE, 8, 2, 8, columns // GROUP, 2, 4, 8).permute(_WEIGHT_ORDER)
    return pack_signed_nibbles(tiles.reshape(rows, columns))


def unpack_weight(packed: Tensor) -> Tensor:
    """Inverse of :func:`pack_weight`."""
    rows, columns = packed.shape[0], 2 * packed.shape[1]
    tiles = unpack_signed_nibbles(packed).reshape(rows // TILE, columns // GROUP, 8, 8, 4, 2, 2, 8)
    return tiles.permute(_inverse(_WEIGHT_ORDER)).reshape(rows, columns)


def pack_scale(scale: Tensor) -> Tensor:
    """Scales [N, G] as [G, N]; N is a multiple of 128."""
    rows, groups = scale.shape
    return scale.reshape(rows // TILE, 8, 2, 4, 2, groups).permute(_SCALE_ORDER).reshape(groups, rows)


def unpack_scale(packed: Tensor) -> Tensor:
    """Inverse of :func:`pack_scale`."""
    groups, rows = packed.shape
    tiles = packed.reshape(rows // TILE, groups, 8, 4, 2, 2)
    return tiles.permute(_inverse(_SCALE_ORDER)).reshape(rows, groups)


def pack_vector(vector: Tensor) -> Tensor:
    """A vector [N] as [N]; N is a multiple of 128."""
    return pack_scale(vector.unsqueeze(-1)).reshape(-1)


def unpack_vector(packed: Tensor) -> Tensor:
    """Inverse of :func:`pack_vector`."""
    return unpack_scale(packed.unsqueeze(0)).reshape(-1)


def pack_down(branch: Tensor) -> Tensor:
    """The lower half [R, K] of a branch as [K, R]; both are multiples of 16."""
    rank, columns = branch.shape
    fragments = branch.reshape(rank // FRAGMENT, FRAGMENT, columns // FRAGMENT, FRAGMENT).permute(2, 0, 1, 3)
    return _pack_fragments(fragments).reshape(columns, rank)


def pack_up(branch: Tensor) -> Tensor:
    """The upper half [N, R] of a branch as [N, R]; both are multiples of 16."""
    rows, rank = branch.shape
    fragments = branch.reshape(rows // FRAGMENT, FRAGMENT, rank // FRAGMENT, FRAGMENT).permute(0, 2, 1, 3)
    return _pack_fragments(fragments).reshape(rows, rank)


def unpack_down(packed: Tensor) -> Tensor:
    """Inverse of :func:`pack_down`."""
    columns, rank = packed.shape
    fragments = _unpack_fragments(packed.reshape(columns // FRAGMENT, rank // FRAGMENT, FRAGMENT**2))
    return fragments.permute(1, 2, 0, 3).reshape(rank, columns)


def unpack_up(packed: Tensor) -> Tensor:
    """Inverse of :func:`pack_up`."""
    rows, rank = packed.shape
    fragments = _unpack_fragments(packed.reshape(rows // FRAGMENT, rank // FRAGMENT, FRAGMENT**2))
    return fragments.permute(0, 2, 1, 3).reshape(rows, rank)


def _pack_fragments(fragments: Tensor) -> Tensor:
    """Fragments [F, G, 16, 16] in the order of lanes."""
    outer, inner = fragments.shape[:2]
    return fragments.reshape(outer, inner, 2, 8, 2, 4, 2).permute(_BRANCH_ORDER).flatten(2)


def _unpack_fragments(packed: Tensor) -> Tensor:
    outer, inner = packed.shape[:2]
    fragments = packed.reshape(outer, inner, 8, 4, 2, 2, 2).permute(_inverse(_BRANCH_ORDER))
    return fragments.reshape(outer, inner, FRAGMENT, FRAGMENT)


def _inverse(order: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(order.index(place) for place in range(len(order)))
