"""Canonical planes to the CPU library's packed weight; the work is csrc/cpu/prepack*.cpp.

The list that ``prepack`` returns (padded to K' columns and N' outputs, csrc/cpu/qv.h):

    int8 [N'/16, K'/4, 16, 4]   operands q - base; base = integer zero point up to 7 bits, 2^(bits-1) where symmetric, 0 where
                                real, 128 for 8-bit codes with a zero point (they would not fit a signed byte)
    int32 [G, N']               their sums over each group of columns
    float32 [Gw, N']            scales
    float32 [Gw, N']            real zero points, where they are real
    int32 [Gw, N']              base - zero point, where base is 128

The product is corrected in int32 by what was left out, which is exact.

Planes are read where they lie, a mapped file's pages included, and several layers of one input go into one weight without a
copy of theirs. Backends and numbers of threads differ in speed alone: the bytes are the same.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_int32, c_int64, c_void_p
from functools import cache

import torch
from torch import Tensor

from qvgen_kernels.contract import LinearSpec
from qvgen_kernels.cpu_build import BuildError
from qvgen_kernels.cpu_library import library
from qvgen_kernels.weight import CanonicalWeight

__all__ = ["arrange", "padded_sizes"]

BLOCK = 32
"""Outputs are padded to a multiple of this."""

HUGE_PAGE = 2 << 20
"""Bytes; weights of that much and more begin at a multiple of it, so that all of them can lie on huge pages."""


class CPlanes(ctypes.Structure):
    """qv::Planes of csrc/cpu/prepack.h."""

    _fields_ = (*((name, c_void_p) for name in ("low", "high", "zero")), ("rows", c_int64))


class CPrepack(ctypes.Structure):
    """qv::Prepack; what the fields mean stands in csrc/cpu/prepack.h."""

    _fields_ = (
        *((name, c_int64) for name in ("in_features", "padded_out", "group", "groups", "padded_group")),
        *((name, c_int64) for name in ("zero_groups", "low_bytes", "high_bytes", "sources")),
        *((name, c_void_p) for name in ("source", "packed", "column_sum")),
        *((name, c_int32) for name in ("bits", "base", "backend", "threads")),
    )


@cache
def _check_size() -> None:
    found, expected = library().qv_prepack_size(), ctypes.sizeof(CPrepack) + ctypes.sizeof(CPlanes)
    if found != expected:
        raise BuildError(f"the CPU library has structures of {found} bytes, expected {expected}; remove it")


def arrange(parts: Sequence[CanonicalWeight], *, spec: LinearSpec, k_unit: int, backend: int) -> list[Tensor]:
    """The packed weight of parts one below the other, as the module's header describes it.

    Args:
        parts: Checked tensors on the CPU.
        spec: The spec of the whole.
        k_unit: A group of columns is padded to a multiple of this.
        backend: Number of a backend of the library that runs here.

    Returns:
        The list.
    """
    _check_size()
    padded_group, padded_out = padded_sizes(spec, k_unit)
    padded_in = spec.num_groups * padded_group
    packed = _aligned(padded_out * padded_in).view(padded_out // 16, padded_in // 4, 16, 4)
    column_sum = torch.empty(spec.num_groups, padded_out, dtype=torch.int32, device="cpu")
    planes = [[plane.contiguous() for plane in part.planes] for part in parts]
    own_zero = spec.weight_zero_point == "integer" and spec.weight_bits < 8
    zeros = [part.zero_point.contiguous() if own_zero and part.zero_point is not None else None for part in parts]
    sources = (CPlanes * len(parts))(
        *(
            CPlanes(
                low=own[0].data_ptr(),
                high=own[1].data_ptr() if len(own) == 2 else None,
                zero=None if zero is None else zero.data_ptr(),
                rows=own[0].shape[0],
            )
            for own, zero in zip(planes, zeros, strict=True)
        )
    )
    call = CPrepack(
        in_features=spec.in_features,
        padded_out=padded_out,
        group=spec.group_size,
        groups=spec.num_groups,
        padded_group=padded_group,
        zero_groups=spec.num_weight_groups,
        low_bytes=planes[0][0].shape[1],
        high_bytes=planes[0][-1].shape[1],
        sources=len(parts),
        source=ctypes.addressof(sources),
        packed=packed.data_ptr(),
        column_sum=column_sum.data_ptr(),
        bits=spec.weight_bits,
        base=_base(spec),
        backend=backend,
        threads=torch.get_num_threads(),
    )
    library().qv_prepack(ctypes.addressof(call))
    return [packed, column_sum, *_vectors(parts, spec=spec, padded_out=padded_out)]


def _vectors(parts: Sequence[CanonicalWeight], *, spec: LinearSpec, padded_out: int) -> list[Tensor]:
    """The scales, and the part of the zero points that is not in the operands."""
    scales = [part.scale for part in parts]
    zeros = [part.zero_point for part in parts if part.zero_point is not None]
    vectors = [_by_output(scales, spec, padded_out)]
    if spec.weight_zero_point == "real":
        vectors.append(_by_output(zeros, spec, padded_out))
    if spec.weight_bits == 8 and spec.weight_zero_point != "none":
        whole = [zero.to(torch.int32) for zero in zeros if not zero.is_floating_point()]
        left = whole or [torch.zeros_like(scale, dtype=torch.int32) for scale in scales]
        vectors.append(_by_output([128 - zero for zero in left], spec, padded_out))
    return vectors


def _base(spec: LinearSpec) -> int:
    """The number that is subtracted from every code where it is one number for the whole layer."""
    if spec.weight_zero_point == "none":
        return int(2 ** (spec.weight_bits - 1))
    return 128 if spec.weight_bits == 8 else 0


def padded_sizes(spec: LinearSpec, k_unit: int) -> tuple[int, int]:
    """Columns of a group and outputs, as they are stored."""
    return -(-spec.group_size // k_unit) * k_unit, -(-spec.out_features // BLOCK) * BLOCK


def _aligned(size: int) -> Tensor:
    """Uninitialized int8 [size]. What is left over before and behind it is never touched, so it takes no memory."""
    unit = HUGE_PAGE if size >= HUGE_PAGE else 64
    memory = torch.empty(size + unit, dtype=torch.int8, device="cpu")
    start = -memory.data_ptr() % unit
    return memory[start : start + size]


def _by_output(values: Sequence[Tensor], spec: LinearSpec, padded_out: int) -> Tensor:
    """Values [N] or [N, Gw] of all parts as contiguous [Gw, N'], zeros after N."""
    padded = values[0].new_zeros(spec.num_weight_groups, padded_out)
    first = 0
    for part in values:
        columns = part.reshape(part.shape[0], -1).t()
        padded[:, first : first + part.shape[0]] = columns
        first += part.shape[0]
    return padded
