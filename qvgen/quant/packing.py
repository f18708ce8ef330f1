"""Canonical packing of integer codes: the bytes of a packed checkpoint, on every machine and backend.

Codes are UNSIGNED, [N, K] with K contiguous, in [0, 2^bits - 1]. A symmetric grid stores q + 2^(bits-1), with
the implied zero point 2^(bits-1). A row never shares a byte with another one: rows can be cut (tensor
parallelism), read and checked alone. Little end first: the column with the smaller index lies in the lower
bits.

    bits   planes                                                  bytes per weight
    2      low  uint8 [N, ceil(K/4)]  codes of k = 4j .. 4j+3       0.25
    3      low  uint8 [N, ceil(K/4)]  low two bits, as for 2 bits   0.375
           high uint8 [N, ceil(K/8)]  top bit of k = 8j .. 8j+7
    4      uint8 [N, ceil(K/2)]       codes of k = 2j, 2j+1         0.5
    5..8   uint8 [N, K]               one code in a byte            1

      bit  7 6 5 4 3 2 1 0                  bit  7 6 5 4 3 2 1 0
    low    k3  k2  k1  k0   (4j+0..3)     high   7 6 5 4 3 2 1 0   (8j+0..7)
    4-bit  [  k1 ] [  k0 ]  (2j+0..1)

Three bits take two planes because 3 does not divide 8: a shared plane would tear codes over byte borders, and
the first plane alone is the 2-bit format, so that one unpacker serves both. The bytes after the last column
hold zero codes, which makes the bytes of a tensor unique (checksums compare). 5 to 8 bits are stored plainly:
they are for measurement, and what runs at 8 bits reads bytes anyway.

Example (one row, 3 bits; low two bits 1,2,3,0,1 and top bits 0,0,0,1,1):
    >>> import torch
    >>> codes = torch.tensor([[1, 2, 3, 4, 5]], dtype=torch.uint8)
    >>> low, high = pack_codes(codes, bits=3)
    >>> [f"{byte:08b}" for byte in low[0].tolist()], [f"{byte:08b}" for byte in high[0].tolist()]
    (['00111001', '00000001'], ['00011000'])
    >>> unpack_codes((low, high), bits=3, in_features=5).tolist()
    [[1, 2, 3, 4, 5]]

Leaves out: scales and zero points (stored beside the planes), signs (see above), every backend's own order
(made at load).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["pack_codes", "plane_shapes", "unpack_codes"]

# bits -> ((bits of the code in this plane, lowest bit of the code in this plane), ...)
_PLANES: dict[int, tuple[tuple[int, int], ...]] = {
    2: ((2, 0),),
    3: ((2, 0), (1, 2)),
    4: ((4, 0),),
    5: ((8, 0),),
    6: ((8, 0),),
    7: ((8, 0),),
    8: ((8, 0),),
}


def _planes(bits: int) -> tuple[tuple[int, int], ...]:
    if isinstance(bits, bool) or bits not in _PLANES:
        raise ValueError(f"bits={bits!r} can't be packed; use a whole number from 2 to 8")
    return _PLANES[bits]


def plane_shapes(*, bits: int, out_features: int, in_features: int) -> tuple[tuple[int, int], ...]:
    """Shape of every plane of a [out_features, in_features] code tensor, in the order of :func:`pack_codes`.

    Raises:
        ValueError: ``bits`` is outside 2..8 or a size is not positive.

    Example:
        >>> plane_shapes(bits=3, out_features=2, in_features=9)
        ((2, 3), (2, 2))
    """
    planes = _planes(bits)
    if out_features < 1 or in_features < 1:
        raise ValueError(f"shape [{out_features}, {in_features}] has no codes; both sizes must be positive")
    return tuple((out_features, -(-in_features * width // 8)) for width, _ in planes)


def pack_codes(codes: Tensor, *, bits: int) -> tuple[Tensor, ...]:
    """Pack unsigned codes; exact, inverse :func:`unpack_codes`.

    Args:
        codes: uint8 [N, K], values 0 .. 2^bits - 1, any strides.
        bits: width of a code, 2 .. 8.

    Returns:
        One plane (2, 4 .. 8 bits) or two (3 bits: low, high), uint8, contiguous, shapes as
        :func:`plane_shapes`. A plane never shares memory with ``codes``.

    Raises:
        ValueError: ``bits`` outside 2..8, ``codes`` not uint8 or not a matrix, or a code above 2^bits - 1.
    """
    planes = _planes(bits)
    if codes.dtype != torch.uint8:
        raise ValueError(f"codes are {codes.dtype}; they must be torch.uint8 (symmetric codes: add 2^(bits-1) first)")
    if codes.ndim != 2 or 0 in codes.shape:
        raise ValueError(f"codes have shape {list(codes.shape)}; they must be [out_features, in_features], not empty")
    largest = int(codes.max())
    if largest >= 2**bits:
        raise ValueError(f"code {largest} does not fit into {bits} bits; codes must lie in 0..{2**bits - 1}")
    return tuple(_pack_plane(codes, width=width, shift=shift) for width, shift in planes)


def unpack_codes(planes: Sequence[Tensor], *, bits: int, in_features: int) -> Tensor:
    """Unpack what :func:`pack_codes` made; exact.

    Args:
        planes: uint8 planes, any strides, in the order of :func:`pack_codes`.
        bits: width of a code, 2 .. 8.
        in_features: K, which the planes alone do not tell.

    Returns:
        uint8 [N, K], contiguous, sharing no memory with the planes.

    Raises:
        ValueError: ``bits`` outside 2..8, wrong number, dtype or shape of the planes, or bits set that no
            packing sets (padding after column K, a stored byte above 2^bits - 1): the file is damaged or of
            another width.
    """
    layout = _planes(bits)
    if len(planes) != len(layout):
        raise ValueError(f"{len(planes)} planes for {bits}-bit codes; pass {len(layout)}")
    for plane in planes:
        if plane.dtype != torch.uint8 or plane.ndim != 2:
            raise ValueError(f"plane is {plane.dtype} {list(plane.shape)}; it must be a torch.uint8 matrix")
    shapes = plane_shapes(bits=bits, out_features=planes[0].shape[0], in_features=in_features)
    codes: Tensor | None = None
    for plane, shape, (width, shift) in zip(planes, shapes, layout, strict=True):
        if tuple(plane.shape) != shape:
            raise ValueError(
                f"plane has shape {list(plane.shape)}; "
                f"{bits}-bit codes with in_features={in_features} need {list(shape)}"
            )
        part = _unpack_plane(plane, width=width)
        if bool(part[:, in_features:].any()):
            raise ValueError(
                f"padding after column {in_features} is not 0; the plane is damaged or in_features is wrong"
            )
        part = part[:, :in_features] << shift
        codes = part if codes is None else codes | part
    assert codes is not None  # every width has at least one plane
    if layout[0][0] == 8 and int(codes.max()) >= 2**bits:
        raise ValueError(
            f"code {int(codes.max())} does not fit into {bits} bits; the plane is damaged or bits is wrong"
        )
    return codes


def _pack_plane(codes: Tensor, *, width: int, shift: int) -> Tensor:
    """Bits shift .. shift+width-1 of codes uint8 [N, K] as uint8 [N, ceil(K*width/8)]."""
    columns = codes.shape[1]
    per_byte = 8 // width
    # Byte-wise or-ing of strided columns: no integer sum, which would widen every code to 8 bytes.
    packed = torch.zeros(codes.shape[0], -(-columns // per_byte), dtype=torch.uint8, device=codes.device)
    for position in range(min(per_byte, columns)):
        field = ((codes[:, position::per_byte] >> shift) & (2**width - 1)) << (position * width)
        packed[:, : field.shape[1]] |= field
    return packed


def _unpack_plane(plane: Tensor, *, width: int) -> Tensor:
    """Inverse of :func:`_pack_plane` before shifting: uint8 [N, bytes] -> uint8 [N, bytes * 8 / width]."""
    per_byte = 8 // width
    fields = torch.empty(*plane.shape, per_byte, dtype=torch.uint8, device=plane.device)
    for position in range(per_byte):
        fields[..., position] = (plane >> (position * width)) & (2**width - 1)
    return fields.flatten(1)
