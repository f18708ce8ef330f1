"""Signed 4-bit codes, two to a byte, the even column in the low nibble: the row-major order of other people's formats."""

from __future__ import annotations

import torch
from torch import Tensor


def pack_signed_nibbles(codes: Tensor) -> Tensor:
    """Pack codes int8 [N, K] of -8..7 as int8 [N, K / 2]; K is even.

    Example:
        >>> import torch
        >>> pack_signed_nibbles(torch.tensor([[1, -7, 7, -1]], dtype=torch.int8)).view(torch.uint8).tolist()
        [[145, 247]]
    """
    low, high = (codes[:, start::2].to(torch.int16) & 0xF for start in (0, 1))
    return (low | (high << 4)).to(torch.uint8).view(torch.int8)


def unpack_signed_nibbles(packed: Tensor) -> Tensor:
    """Inverse of :func:`pack_signed_nibbles`."""
    wide = packed.view(torch.uint8).to(torch.int16)
    fields = torch.stack([wide & 0xF, wide >> 4], dim=-1).flatten(1)
    return ((fields ^ 8) - 8).to(torch.int8)
