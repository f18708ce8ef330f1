"""The arguments of the CUDA kernels as Python sees them: csrc/cuda/int4.h, field by field."""

from __future__ import annotations

import ctypes
from ctypes import c_int32, c_int64, c_void_p

__all__ = ["STAGE_BYTES", "THREADS", "TILE", "CMultiply", "CQuantize", "multiply_shared_bytes", "quantize_shared_bytes"]

THREADS = 256
"""Threads of a block: kThreads."""

TILE = 128
"""Rows and outputs of a block, and the columns that codes are padded to: kTileRows, kTileOutputs, 2 kTileBytes."""

STAGE_BYTES = 2 * TILE * (TILE // 2)
STAGES = 3
CHUNK = 8
"""Columns that one thread quantizes at a time: kChunk."""


class CQuantize(ctypes.Structure):
    """qv::Quantize; what the fields mean stands in csrc/cuda/int4.h."""

    _fields_ = (
        *((name, c_void_p) for name in ("x", "input_scale", "clip_low", "clip_high", "row_scale", "row_zero")),
        *((name, c_void_p) for name in ("codes", "scale", "zero", "sums")),
        ("row_stride", c_int64),
        *((name, c_int32) for name in ("rows", "columns", "code_stride", "range_groups", "sum_groups")),
        *((name, c_int32) for name in ("qmax", "symmetric", "scale_dtype", "arithmetic")),
    )


class CMultiply(ctypes.Structure):
    """qv::Multiply."""

    _fields_ = (
        *((name, c_void_p) for name in ("codes", "weight", "scale", "zero", "sums", "weight_scale", "weight_zero")),
        *((name, c_void_p) for name in ("weight_real", "weight_sums", "bias", "branch", "gate", "residual", "y")),
        ("accumulators", c_void_p),
        *((name, c_int64) for name in ("gate_row_stride", "residual_row_stride")),
        *((name, c_int32) for name in ("rows", "outputs", "code_stride", "group", "groups", "range_groups")),
        *((name, c_int32) for name in ("weight_groups", "gate_rows", "gate_float32", "function")),
    )


def quantize_shared_bytes(columns: int, range_groups: int) -> int:
    """Shared memory of a block of the quantizer: three numbers a chunk, two a group, and a flag."""
    return 4 * (3 * -(-columns // CHUNK) + 2 * range_groups + 1)


def multiply_shared_bytes() -> int:
    """Shared memory of a block of the product."""
    return STAGES * STAGE_BYTES
