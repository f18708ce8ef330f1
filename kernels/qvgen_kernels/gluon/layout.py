"""Weights as the tensor cores of Hopper take them from shared memory: a signed byte each, q - 2^(bits-1), [N, K'].

K' is what quantized rows have (qvgen_kernels.triton.layout), and columns beyond K are 0. All other tensors of a layer are
those of the Triton backend. A byte a weight is twice what 4-bit codes take, and 2.7 times what 3-bit codes do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from qvgen_kernels.contract import LinearSpec
from qvgen_kernels.triton.layout import join_parts, layout_of, weight_vectors
from qvgen_kernels.weight import CanonicalWeight, unpack_planes

__all__ = ["arrange", "packed_bytes"]


def arrange(parts: Sequence[CanonicalWeight], *, spec: LinearSpec) -> list[Tensor]:
    """The packed weight of parts one below the other, on their device.

    Args:
        parts: Checked canonical tensors.
        spec: The spec of the whole; without groups.
    """
    return join_parts([_arrange_part(part, replace(spec, out_features=part.planes[0].shape[0])) for part in parts])


def _arrange_part(part: CanonicalWeight, spec: LinearSpec) -> list[Tensor]:
    codes = unpack_planes(part.planes, spec=spec)
    # A code's distance from 2^(bits-1) modulo 256, in two's complement: exact for every width.
    operand = (codes - (1 << (spec.weight_bits - 1))).view(torch.int8)
    padded = functional.pad(operand, (0, layout_of(spec).columns - spec.in_features))
    return [padded.contiguous(), *weight_vectors(part, codes, spec=spec)]


def packed_bytes(spec: LinearSpec) -> int:
    """Memory that a layer's prepacked tensors take."""
    vectors = (
        1 + (spec.weight_zero_point != "none") + (spec.activation_bits == 8 and spec.activation_zero_point == "integer")
    )
    return spec.out_features * (layout_of(spec).columns + 4 * vectors)
