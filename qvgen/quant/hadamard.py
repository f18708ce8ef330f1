"""Block-wise normalized Hadamard transform: spreads outliers over a block and leaves every product unchanged.

H (Sylvester, size B = 2^m, divided by sqrt(B)) is symmetric and orthogonal, so (x H)(W H)^T = x W^T. Each run of B
columns is transformed by itself. Butterflies with strides 1, 2, 4, ..., B/2 and one multiplication at the end: the
order is fixed, so that a row's result does not depend on its batch, and training equals deployment to the bit (a
matrix product would choose its own order of summation).

Example:
    >>> import torch
    >>> hadamard_transform(torch.tensor([[1.0, 0.0, 0.0, 0.0]]), block_size=4)
    tensor([[0.5000, 0.5000, 0.5000, 0.5000]])
"""

from __future__ import annotations

import math

from torch import Tensor, stack


def hadamard_transform(x: Tensor, *, block_size: int) -> Tensor:
    """Transform x [..., K] by blocks of ``block_size`` columns, in float32.

    Raises:
        ValueError: ``block_size`` is no power of two, or does not divide K.
    """
    columns = x.shape[-1]
    if block_size < 1 or block_size & (block_size - 1):
        raise ValueError(f"block_size={block_size} is no power of two; use 16, 64 or 256")
    if columns % block_size:
        raise ValueError(f"block_size={block_size} does not divide {columns} columns; use a power of two that does")
    y = x.float()
    stride = 1
    while stride < block_size:
        pairs = y.unflatten(-1, (-1, 2, stride))
        first, second = pairs[..., 0, :], pairs[..., 1, :]
        y = stack((first + second, first - second), -2).flatten(-3)
        stride *= 2
    return y * (1.0 / math.sqrt(block_size))
