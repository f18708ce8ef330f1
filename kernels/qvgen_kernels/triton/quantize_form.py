"""The words for the quantizer's kernel: constants of its code, pointers and sizes; and what it makes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from qvgen_kernels.contract import SCALE_FLOOR, LinearSpec
from qvgen_kernels.triton.layout import layout_of, unsigned_activations

__all__ = ["TILE", "WIDEST_TILE", "Operands", "QuantizeForm", "QuantizeSizes", "QuantizeTensors", "quantize_form"]

LARGEST = {"bfloat16": 2.0**127 * (2 - 2.0**-7), "float16": 65504.0}

WIDEST_TILE = 256
"""Vectors of rows are this long or a multiple, so that no tile of the product reads beyond them."""

_BLOCK = 8192
"""Columns that a program holds at a time, at most."""

TILE = 4096
"""Elements that four warps hold."""


class Operands(NamedTuple):
    """Quantized rows.

    Attributes:
        codes: int8 [M, K'], columns padded by groups as the weight's.
        scale: float32 [Ga, M']; NaN in rows that are not finite. M' is M rounded up to a multiple of every tile.
        shift: int32 [Ga, M'], 128 - zero point; None where operands are q - z.
        row_sum: int32 [G, M'], sums of q - z; None where nothing needs them.
    """

    codes: Tensor
    scale: Tensor
    shift: Tensor | None
    row_sum: Tensor | None


@dataclass(frozen=True)
class QuantizeForm:
    """Constants of a compiled quantizer: what its code is for.

    Attributes:
        segment: Columns that share a scale.
        group: Columns of a group, which a segment holds one or more of.
        padded_group: Columns between the starts of two groups in the output.
        groups: Groups of a segment.
        segments: Segments of a row.
        qmax: Largest code.
        symmetric: Without zero points.
        static: Scales and zero points are given.
        shifted: Codes are stored minus 128.
        arithmetic: activation_arithmetic of the spec.
        scale_type: scale_dtype of the spec.
        floor: Its smallest scale.
        largest: Its largest finite number; 0 for float32.
        rows: Segments of a program.
        block: Columns that are read at a time, a power of two.
    """

    segment: int
    group: int
    padded_group: int
    groups: int
    segments: int
    qmax: int
    symmetric: bool
    static: bool
    shifted: bool
    arithmetic: str
    scale_type: str
    floor: float
    largest: float
    rows: int
    block: int


class QuantizeTensors(NamedTuple):
    """Pointers of the kernel; what is not there is None."""

    x: Any
    codes: Any
    scale: Any
    shift: Any
    row_sum: Any
    input_scale: Any
    clip_low: Any
    clip_high: Any
    row_scale: Any
    row_zero_point: Any


class QuantizeSizes(NamedTuple):
    """Sizes and strides of the kernel, in elements."""

    segments: Any
    x_row: Any
    x_column: Any
    codes_row: Any
    vector_row: Any


def quantize_form(spec: LinearSpec, *, segments: int) -> QuantizeForm:
    """The constants of the quantizer of a layer.

    Args:
        spec: The layer.
        segments: All segments of the call.
    """
    layout = layout_of(spec)
    per_row = spec.in_features // (spec.activation_group_size or spec.in_features)
    block = min(_BLOCK, _power_of_two(layout.padded_group))
    rows = max(1, min(TILE // block, _power_of_two(segments)))
    return QuantizeForm(
        segment=spec.in_features // per_row,
        group=layout.group,
        padded_group=layout.padded_group,
        groups=layout.groups // per_row,
        segments=per_row,
        qmax=spec.activation_qmax,
        symmetric=spec.activation_zero_point == "none",
        static=spec.activation_range == "static",
        shifted=unsigned_activations(spec),
        arithmetic=spec.activation_arithmetic,
        scale_type=spec.scale_dtype,
        floor=SCALE_FLOOR[spec.scale_dtype],
        largest=LARGEST.get(spec.scale_dtype, 0.0),
        rows=rows,
        block=block,
    )


def _power_of_two(least: int) -> int:
    return 1 << (least - 1).bit_length()
