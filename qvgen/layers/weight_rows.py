"""A layer's weight that is packed by rows: a few megabytes of it at a time, from memory or from a file.

Codes are found weight by weight, with the scale of the row or the group, so those of some rows are those rows of all codes.
Only the error |Q(W) - W|^2 / |W|^2 is a number of the whole layer. Its squares are put together before they are added, in
float64, because the last bits of a sum depend on the order of additions: 8 bytes for each weight.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from qvgen.quant.precision import has_float64, to_float64

if TYPE_CHECKING:
    from qvgen.layers.fake_quant_linear import FakeQuantLinear
    from qvgen.layers.packed_linear import PackedLinear

CHUNK = 1 << 20
"""Weights that are worked on at a time."""

PACKING_SCRATCH = 10
"""Bytes for each weight of a layer that is packed: the squares of its error in float64, and its codes."""


class WeightRows(Protocol):
    """A matrix of which rows are asked for: a tensor, or one that lies in a file."""

    @property
    def shape(self) -> torch.Size:
        """Sizes [N, K] of the whole."""

    def __getitem__(self, rows: slice, /) -> Tensor:
        """Some rows [n, K]."""


def row_chunks(shape: torch.Size) -> Iterator[slice]:
    """Rows of a matrix [N, K], in order, about ``CHUNK`` numbers at a time.

    Example:
        >>> tuple((rows.start, rows.stop) for rows in row_chunks(torch.Size([5, 2**19])))
        ((0, 2), (2, 4), (4, 5))
    """
    step = max(1, CHUNK // max(1, shape[1]))
    yield from (slice(first, min(first + step, shape[0])) for first in range(0, shape[0], step))


@torch.no_grad()
def pack_weight_(packed: PackedLinear, layer: FakeQuantLinear, weight: WeightRows) -> None:
    """Give a packed layer the codes of all weight widths that a layer was trained with, their scales, and its error.

    Args:
        packed: Its tensors are there, and hold nothing yet.
        layer: Its weight quantizers are asked, and not its weight.
        weight: float32 [N, K], on the device of ``packed``; read twice.
    """
    quantizers = layer.weight_quantizers()
    for bits, quantizer in quantizers.items():
        packed.weight_of(bits).store_scales_(quantizer)
    device = packed.codes.device if has_float64(packed.codes.device) else torch.device("cpu")
    squares = torch.empty(weight.shape, dtype=torch.float64, device=device)
    for rows in row_chunks(weight.shape):
        part = weight[rows]
        for bits, quantizer in quantizers.items():
            packed.weight_of(bits).store_rows_(part, quantizer, rows=rows)
        torch.square(to_float64(packed.dequantized_weight(rows) - part), out=squares[rows])
    error = squares.sum()
    for rows in row_chunks(weight.shape):
        torch.square(to_float64(weight[rows]), out=squares[rows])
    packed.weight_error = float(error / squares.sum().clamp(min=1e-30))


@torch.no_grad()
def stored_codes_equal(packed: PackedLinear, layer: FakeQuantLinear, weight: WeightRows) -> tuple[bool, int]:
    """Whether every code of a packed layer is the one that a layer was trained with, and how many were compared.

    Args:
        packed: Packed.
        layer: Its weight quantizers are asked, and not its weight.
        weight: float32 [N, K].
    """
    equal, count = True, 0
    for rows in row_chunks(weight.shape):
        part = weight[rows]
        for bits, quantizer in layer.weight_quantizers().items():
            codes = quantizer.codes(part, rows=rows).cpu()
            equal = equal and torch.equal(codes, packed.weight_of(bits).integer_codes(rows).cpu())
            count += codes.numel()
    return equal, count
