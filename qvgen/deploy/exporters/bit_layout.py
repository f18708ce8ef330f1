"""Codes of some bits in bytes, by a table that says which bit lies where.

A layout is a group of bytes; each byte is eight pairs (code, bit of that code) from the lowest place to the highest. Codes
follow each other through a tensor, group by group, so a row that ends within a group shares its bytes with the next one.
"""

from __future__ import annotations

import torch
from torch import Tensor

Layout = tuple[tuple[tuple[int, int], ...], ...]


def dense_layout(bits: int) -> Layout:
    """Codes one behind the other without gaps, the first one in the lowest bits: 8 codes in ``bits`` bytes.

    Example:
        >>> dense_layout(3)[0]
        ((0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (2, 0), (2, 1))
    """
    return tuple(tuple(divmod(8 * byte + place, bits) for place in range(8)) for byte in range(bits))


def pack_bits(codes: Tensor, layout: Layout) -> Tensor:
    """Pack codes uint8 of any shape as uint8 [groups, bytes of a group].

    Example:
        >>> import torch
        >>> pack_bits(torch.tensor([1, 2, 3, 4, 5, 6, 7, 0], dtype=torch.uint8), dense_layout(3)).tolist()
        [[209, 88, 31]]
    """
    groups = codes.reshape(-1, codes_of_group(layout))
    packed = torch.zeros(groups.shape[0], len(layout), dtype=torch.uint8)
    for byte, places in enumerate(layout):
        for place, (code, bit) in enumerate(places):
            packed[:, byte] |= ((groups[:, code] >> bit) & 1) << place
    return packed


def unpack_bits(packed: Tensor, layout: Layout) -> Tensor:
    """Inverse of :func:`pack_bits`: uint8, one code behind the other."""
    groups = packed.reshape(-1, len(layout))
    codes = torch.zeros(groups.shape[0], codes_of_group(layout), dtype=torch.uint8)
    for byte, places in enumerate(layout):
        for place, (code, bit) in enumerate(places):
            codes[:, code] |= ((groups[:, byte] >> place) & 1) << bit
    return codes.flatten()


def codes_of_group(layout: Layout) -> int:
    """Codes in a group of bytes."""
    return 1 + max(code for places in layout for code, _ in places)
