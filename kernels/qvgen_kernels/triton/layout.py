r"""Packed weights of the Triton backend: bytes that a tensor core's operand is unpacked from without moving any.

Columns are padded by groups and cut into chunks of F fields of C columns. Column f C + j of a chunk lies in byte j:

    bits  F  bytes of a chunk of one output   where field f stands               what unpacking makes of it
    4     2  C                                bits 4 f .. 4 f + 3                16 (q - 8): shift left, keep the high half
    2     4  C                                bits 2 f, 2 f + 1                  64 (q - 2)
    3     8  3 C: low bits of fields 0 .. 3,  low bits 2 (f % 4), 2 (f % 4) + 1  32 (q - 4)
             low bits of fields 4 .. 7, top   top: bit f
    5..8  1  C                                the byte                           q - 2^(bits-1)

so that one load of bytes [N, C] gives F operands [N, C] of neighbouring columns, each by a shift and a mask of whole
registers. The factor leaves the int32 sum by a shift, which is exact. Top bits are stored inverted, which makes a code
unsigned minus 2^(bits-1); padding is the code 2^(bits-1), whose operand is 0.

Prepacked tensors, in this order: int8 [N, bytes]; float32 [Gw, N] scales; integer zero points: int32 [Gw, N],
2^(bits-1) - zero; real ones: float32 [Gw, N]; and where activations are unsigned bytes (8 bits with a zero point): int32
[G, N], the sums of q - 2^(bits-1) over each group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from qvgen_kernels.contract import INT32_LIMIT, LinearSpec
from qvgen_kernels.weight import CanonicalWeight, unpack_planes

__all__ = ["Layout", "PackedWeight", "arrange", "join_parts", "layout_of", "named_weight", "weight_vectors"]

_FIELDS = {2: 4, 3: 8, 4: 2}
_WIDEST = {1: 128, 2: 64, 4: 64, 8: 32}
"""Fields of a chunk -> columns of the widest field, so that a chunk has at most 256 columns."""


@dataclass(frozen=True)
class Layout:
    """Where the columns of a layer lie.

    Attributes:
        bits: Width of a weight code.
        fields: F, fields of a chunk.
        width: C, columns of a field.
        group: Columns of a group, as the contract has them.
        padded_group: As they are stored: a multiple of C.
        groups: G.
        chunks: Chunks of the whole row.
    """

    bits: int
    fields: int
    width: int
    group: int
    padded_group: int
    groups: int
    chunks: int

    @property
    def columns(self) -> int:
        """K', stored columns of a row."""
        return self.chunks * self.fields * self.width

    @property
    def fields_per_group(self) -> int:
        """Either a multiple of the fields of a chunk, or a divisor of them."""
        return self.padded_group // self.width

    @property
    def chunk_bytes(self) -> int:
        """Bytes of one output in a chunk."""
        return (3 if self.bits == 3 else 1) * self.width

    @property
    def shift(self) -> int:
        """Bits by which sums are too far left."""
        return 8 - self.bits if self.bits < 5 else 0


@lru_cache(maxsize=1024)
def layout_of(spec: LinearSpec) -> Layout:
    """The layout of a layer: the widest fields that pad no group by more than a sixteenth, else those that pad least."""
    fields = _FIELDS.get(spec.weight_bits, 1)
    widest = _WIDEST[fields]
    options = []
    for width in (128, 64, 32):  # 32: the smallest product of signed bytes
        if width > widest:
            continue
        count = _whole_fields(-(-spec.group_size // width), fields, alone=spec.num_groups == 1)
        padded = count * width
        chunks = -(-padded * spec.num_groups // (fields * width))
        options.append(Layout(spec.weight_bits, fields, width, spec.group_size, padded, spec.num_groups, chunks))
    close = [option for option in options if 16 * option.columns <= 17 * spec.in_features]
    return close[0] if close else min(options, key=lambda option: option.columns)


def _whole_fields(count: int, fields: int, *, alone: bool) -> int:
    """Fields of a group, at least ``count``: a multiple of the fields of a chunk, or, of several groups, a divisor."""
    if count >= fields or alone:
        return -(-count // fields) * fields
    return 1 << (count - 1).bit_length()


def sum_limit(spec: LinearSpec) -> int:
    """Largest |sum| on the way, operands at their ends: bytes of activations times bytes of weights."""
    return spec.group_size * 128 * 128


def fits(spec: LinearSpec) -> bool:
    """Whether no sum of shifted operands can leave int32."""
    return sum_limit(spec) < INT32_LIMIT


@dataclass(frozen=True)
class PackedWeight:
    """The prepacked tensors by name; what a layer does not have is None.

    Attributes:
        codes: int8 [N, bytes].
        scale: float32 [Gw, N].
        correction: int32 [Gw, N], 2^(bits-1) - zero point.
        zero_point: float32 [Gw, N], real.
        column_sum: int32 [G, N].
    """

    codes: Tensor
    scale: Tensor
    correction: Tensor | None = None
    zero_point: Tensor | None = None
    column_sum: Tensor | None = None


def unsigned_activations(spec: LinearSpec) -> bool:
    """Whether activation operands q - z need nine bits, so that q - 128 is stored and the rest corrected in int32."""
    return spec.activation_bits == 8 and spec.activation_zero_point == "integer"


def named_weight(weight: Sequence[Tensor], *, spec: LinearSpec, bytewise: bool = False) -> PackedWeight:
    """Name the tensors that :func:`arrange` returned; ``bytewise``: codes are a byte each, whatever their width.

    Raises:
        ValueError: they belong to another layer or were cast to another type.
    """
    layout = layout_of(spec)
    shape = (spec.out_features, layout.columns if bytewise else layout.chunks * layout.chunk_bytes)
    zero = {"integer": "correction", "real": "zero_point"}.get(spec.weight_zero_point)
    names = ["codes", "scale", *([zero] if zero else []), *(["column_sum"] if unsigned_activations(spec) else [])]
    given = weight[0], weight[1]
    if len(weight) != len(names) or given[0].shape != shape or given[0].dtype != torch.int8:
        raise ValueError(
            f"weight is {given[0].dtype} {list(given[0].shape)} of {len(weight)} tensors; it must be what prepack "
            f"returned for [{spec.out_features}, {spec.in_features}]: torch.int8 {list(shape)} of {len(names)}"
        )
    # module.to(torch.bfloat16) also casts buffers: coarser scales would be another network, silently.
    if given[1].dtype != torch.float32 or (zero == "zero_point" and weight[2].dtype != torch.float32):
        raise ValueError(f"weight has {given[1].dtype} scales; they must be torch.float32, as prepack returned them")
    return PackedWeight(**dict(zip(names, weight, strict=True)))


def arrange(parts: Sequence[CanonicalWeight], *, spec: LinearSpec) -> list[Tensor]:
    """The packed weight of parts one below the other, on their device; see the module's header.

    Args:
        parts: Checked canonical tensors.
        spec: The spec of the whole.
    """
    return join_parts([_arrange_part(part, spec=replace(spec, out_features=part.planes[0].shape[0])) for part in parts])


def join_parts(arranged: Sequence[list[Tensor]]) -> list[Tensor]:
    """Prepacked tensors of layers as those of one: codes one below the other, vectors one after the other."""
    if len(arranged) == 1:
        return arranged[0]
    joined = [torch.cat([part[0] for part in arranged])]
    return joined + [torch.cat(vectors, 1) for vectors in zip(*(part[1:] for part in arranged), strict=True)]


def _arrange_part(part: CanonicalWeight, *, spec: LinearSpec) -> list[Tensor]:
    layout = layout_of(spec)
    codes = unpack_planes(part.planes, spec=spec)
    return [pack_codes(codes, layout=layout), *weight_vectors(part, codes, spec=spec)]


def weight_vectors(part: CanonicalWeight, codes: Tensor, *, spec: LinearSpec) -> list[Tensor]:
    """Scales, zero points and sums of a part, as the module's header has them; codes uint8 [N, K]."""
    layout, middle = layout_of(spec), 1 << (spec.weight_bits - 1)
    tensors = [_by_group(part.scale)]
    if part.zero_point is not None:
        zero = _by_group(part.zero_point)
        tensors.append(zero if zero.is_floating_point() else middle - zero.to(torch.int32))
    if unsigned_activations(spec):
        sums = codes.unflatten(1, (layout.groups, layout.group)).sum(-1, dtype=torch.int32)
        tensors.append((sums - middle * layout.group).t().contiguous())
    return tensors


def _by_group(values: Tensor) -> Tensor:
    """Values [N] or [N, Gw] as contiguous [Gw, N], a new tensor."""
    return values.reshape(values.shape[0], -1).t().clone(memory_format=torch.contiguous_format)


def pack_codes(codes: Tensor, *, layout: Layout) -> Tensor:
    """Codes uint8 [N, K] as the bytes of a layout, int8 [N, chunks * bytes of a chunk]; exact."""
    middle = 1 << (layout.bits - 1)
    grouped = codes.unflatten(1, (layout.groups, layout.group))
    padded = torch.nn.functional.pad(grouped, (0, layout.padded_group - layout.group), value=middle).flatten(1)
    padded = torch.nn.functional.pad(padded, (0, layout.columns - padded.shape[1]), value=middle)
    fields = padded.unflatten(1, (layout.chunks, layout.fields, layout.width))
    # What a code is above 2^(bits-1), in two's complement: the top bit is inverted.
    fields = fields ^ middle if layout.bits < 5 else (fields.to(torch.int16) - middle).to(torch.int8)
    if layout.fields == 1:
        return fields.flatten(1)
    step = 2 if layout.bits == 3 else layout.bits
    low = _by_field(fields & 3 if layout.bits == 3 else fields, step)
    if layout.bits == 3:
        low = torch.cat([low, _by_field(fields >> 2, 1)], 2)
    return low.flatten(1).view(torch.int8)


def _by_field(fields: Tensor, step: int) -> Tensor:
    """Bytes [N, chunks, F * step / 8, C] of fields [N, chunks, F, C] that take ``step`` bits each, first field lowest."""
    per_byte = 8 // step
    parts = fields.unflatten(2, (-1, per_byte))
    total = parts[:, :, :, 0].clone()
    for place in range(1, per_byte):
        total |= parts[:, :, :, place] << (place * step)
    return total
