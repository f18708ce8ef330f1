"""Packed weight times quantized rows, y^T = W x^T, with the whole epilogue in the same kernel: no int32 sum leaves a program.

The weight is the FIRST operand of the product: Hopper's matrix instruction takes it from registers, where it has just been
unpacked; on sm_80 to sm_89 both operands come from registers anyway. Rows are read as they lie, [rows, columns], and
transposed in shared memory's addresses.

A layer without groups is one loop over chunks of columns. With groups there is one pass per group, whose sums are scaled
and added in float32 in the order of the groups; where a chunk of packed bytes holds several groups, one pass per chunk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from qvgen_kernels.contract import LinearSpec, LinearTensors
from qvgen_kernels.triton.epilogue import add_group, finish
from qvgen_kernels.triton.launch import INTERPRETED, launch, sums_are_plain
from qvgen_kernels.triton.layout import PackedWeight, layout_of
from qvgen_kernels.triton.quantize_form import Operands
from qvgen_kernels.triton.tiles import Tile
from qvgen_kernels.triton.unpack import operand

__all__ = [
    "GemmForm",
    "GemmSizes",
    "GemmTensors",
    "WeightTensors",
    "gemm_form",
    "gemm_kernel",
    "launch_arguments",
    "multiply",
]


@dataclass(frozen=True)
class GemmForm:
    """Constants of a compiled product: what its code is for.

    Attributes:
        bits: Width of a weight code.
        fields: Fields of a chunk.
        width: Columns of a field.
        chunk_bytes: Bytes of one output in a chunk.
        fields_per_group: Fields of a group; 0 where there is one group.
        shift: Sums are shifted right by it.
        middle: 2^(bits-1).
        weight_zero: weight_zero_point of the spec.
        weight_scales: Whether an output has a scale for every group.
        input_scales: Whether a row has.
        function: The spec's.
        outputs: Outputs of a tile.
        rows: Rows of a tile.
        band: Tiles of outputs that neighbouring programs share.
        plain: Without inline assembly.
        interpreted: For Triton's interpreter.
    """

    bits: int
    fields: int
    width: int
    chunk_bytes: int
    fields_per_group: int
    shift: int
    middle: int
    weight_zero: str
    weight_scales: bool
    input_scales: bool
    function: str
    outputs: int
    rows: int
    band: int
    plain: bool
    interpreted: bool


class GemmTensors(NamedTuple):
    """Pointers of the epilogue; what is not there is None."""

    y: Any
    bias: Any
    branch: Any
    gate: Any
    residual: Any


class GemmSizes(NamedTuple):
    """Rows, outputs, chunks and groups, and strides in elements; row_stride is that of vectors of rows."""

    rows: Any
    outputs: Any
    chunks: Any
    groups: Any
    row_stride: Any
    gate_rows: Any
    gate_row: Any
    gate_column: Any
    residual_row: Any
    residual_column: Any


@triton.jit
def _field_product(acc, bytes_of, rows_of, chunk, field: tl.constexpr, form: tl.constexpr):
    """Add the product of one field to the sums."""
    column = (chunk * form.fields + field) * form.width
    x = tl.load(rows_of + column)
    if form.bits == 3:
        first = tl.load(bytes_of + chunk * form.chunk_bytes + (field // 4) * form.width)
        second = tl.load(bytes_of + chunk * form.chunk_bytes + 2 * form.width)
    else:
        first = tl.load(bytes_of + chunk * form.chunk_bytes)
        second = first
    w = operand(first, second, field, form.bits, form.plain)
    return tl.dot(w, x.T, acc, out_dtype=tl.int32)


@triton.jit
def _chunk_product(acc, bytes_of, rows_of, chunk, form: tl.constexpr):
    """Add the products of a whole chunk."""
    fields: tl.constexpr = form.fields
    for field in tl.static_range(fields):
        acc = _field_product(acc, bytes_of, rows_of, chunk, field, form)
    return acc


@triton.jit
def _tile_of(sizes, form: tl.constexpr):
    """Outputs and rows of this program: bands of tiles of outputs, so that neighbours share weights and rows."""
    program = tl.program_id(0)
    over_n = (sizes.outputs + form.outputs - 1) // form.outputs
    over_m = (sizes.rows + form.rows - 1) // form.rows
    band = program // (form.band * over_m)
    first = band * form.band
    size = tl.minimum(over_n - first, form.band)
    inside = program % (form.band * over_m)
    n = (first + inside % size) * form.outputs + tl.arange(0, form.outputs)
    m = (inside // size) * form.rows + tl.arange(0, form.rows)
    return n, m


@triton.jit
def gemm_kernel(a, w, tail, sizes, form: tl.constexpr):
    """One tile of outputs."""
    n, m = _tile_of(sizes, form)
    place = (n, m)
    # Rows and outputs beyond the end read the last ones: no masks in the loop.
    last_n, last_m = tl.minimum(n, sizes.outputs - 1).to(tl.int64), tl.minimum(m, sizes.rows - 1).to(tl.int64)
    columns = tl.arange(0, form.width)[None, :]
    bytes_of = w.codes + last_n[:, None] * (sizes.chunks * form.chunk_bytes) + columns
    rows_of = a.codes + last_m[:, None] * (sizes.chunks * form.fields * form.width) + columns
    y = tl.full((form.outputs, form.rows), 0.0, tl.float32)
    if form.fields_per_group == 0:
        acc = tl.full((form.outputs, form.rows), 0, tl.int32)
        for chunk in range(sizes.chunks):
            acc = _chunk_product(acc, bytes_of, rows_of, chunk, form)
        y = add_group(y, acc, 0, place, (a, w), sizes, form)
    elif form.fields_per_group >= form.fields:
        per_group: tl.constexpr = form.fields_per_group // form.fields
        for group in range(sizes.groups):
            acc = tl.full((form.outputs, form.rows), 0, tl.int32)
            for chunk in range(per_group):
                acc = _chunk_product(acc, bytes_of, rows_of, group * per_group + chunk, form)
            y = add_group(y, acc, group, place, (a, w), sizes, form)
    else:
        per_group: tl.constexpr = form.fields_per_group
        per_chunk: tl.constexpr = form.fields // form.fields_per_group
        for chunk in range(sizes.chunks):
            for part in tl.static_range(per_chunk):
                acc = tl.full((form.outputs, form.rows), 0, tl.int32)
                for field in tl.static_range(per_group):
                    acc = _field_product(acc, bytes_of, rows_of, chunk, part * per_group + field, form)
                group = chunk * per_chunk + part
                if group < sizes.groups:  # the last chunk may hold fields of no group
                    y = add_group(y, acc, group, place, (a, w), sizes, form)
    finish(y, place, tail, sizes, form)


def gemm_form(spec: LinearSpec, tile: Tile) -> GemmForm:
    """The constants of the product of a layer."""
    layout = layout_of(spec)
    return GemmForm(
        bits=layout.bits,
        fields=layout.fields,
        width=layout.width,
        chunk_bytes=layout.chunk_bytes,
        fields_per_group=layout.fields_per_group if layout.groups > 1 else 0,
        shift=layout.shift,
        middle=1 << (layout.bits - 1),
        weight_zero=spec.weight_zero_point,
        weight_scales=spec.num_weight_groups > 1,
        input_scales=bool(spec.activation_group_size) and spec.activation_group_size < spec.in_features,
        function=spec.function,
        outputs=tile.outputs,
        rows=tile.rows,
        band=tile.band,
        plain=sums_are_plain(),
        interpreted=INTERPRETED,
    )


def multiply(
    operands: Operands,
    weight: PackedWeight,
    *,
    y: Tensor,
    branch: Tensor | None,
    tensors: LinearTensors,
    spec: LinearSpec,
    tile: Tile,
) -> None:
    """Fill y [M, N] with the layer's outputs.

    Args:
        operands: Quantized rows, M > 0.
        weight: The packed weight.
        y: Contiguous, of x's dtype.
        branch: (x down^T) up^T [M, N] of x's dtype, contiguous, or None.
        tensors: Bias, gate and residual.
        spec: The layer.
        tile: What a program computes.
    """
    packed, tail, sizes = launch_arguments(operands, weight, y=y, branch=branch, tensors=tensors, spec=spec)
    grid = (triton.cdiv(sizes.rows, tile.rows) * triton.cdiv(sizes.outputs, tile.outputs),)
    form = gemm_form(spec, tile)
    launch(gemm_kernel, grid, operands, packed, tail, sizes, form, on=y, num_warps=tile.warps, num_stages=tile.stages)


def launch_arguments(
    operands: Operands,
    weight: PackedWeight,
    *,
    y: Tensor,
    branch: Tensor | None,
    tensors: LinearTensors,
    spec: LinearSpec,
) -> tuple[WeightTensors, GemmTensors, GemmSizes]:
    """Pointers and sizes of a launch; arguments as :func:`multiply`."""
    layout, (rows, outputs) = layout_of(spec), y.shape
    gate, residual = tensors.gate, tensors.residual
    gate_sizes = (1, 0, 0) if gate is None else (rows // gate.shape[0], *gate.stride())
    sizes = GemmSizes(
        rows,
        outputs,
        layout.chunks,
        layout.groups,
        operands.scale.stride(0),
        *gate_sizes,
        *((0, 0) if residual is None else residual.stride()),
    )
    bias = None if tensors.bias is None else tensors.bias.contiguous()
    tail = GemmTensors(y, bias, branch, gate, residual)
    packed = WeightTensors(weight.codes, weight.scale, weight.correction, weight.zero_point, weight.column_sum)
    return packed, tail, sizes


class WeightTensors(NamedTuple):
    """PackedWeight as a kernel takes it."""

    codes: Any
    scale: Any
    correction: Any
    zero_point: Any
    column_sum: Any
