"""Which of many candidate ranges of a weight's rows are worth an exact look: csrc/cpu/range_search.*, on torch's threads.

The sums of |fake_quantize(w) - w|^2.4 come out to :data:`ACCURACY`, which is enough to leave all but a few candidates of a
row out, and takes a fifth of the time of torch's power. Whoever searches decides among the rest by torch's own arithmetic, so
the bits are the same where this does not run (:func:`refusal`).
"""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int32, c_int64, c_void_p
from functools import cache, lru_cache

import torch
from torch import Tensor

from qvgen_kernels.cpu_build import BuildError
from qvgen_kernels.cpu_library import BACKENDS, library, missing_reason, supported

__all__ = ["ACCURACY", "range_errors", "refusal"]

ACCURACY = 1e-3
"""Relative error of a sum between 1e-25 and 1e30, at most; measured 3e-4. Outside of that sums say nothing."""

_VARIANTS = ("vnni", "avx2", "portable")
_COARSE = 8
"""Every eighth candidate is looked at first, so that a row's least error is nearly known when the others are."""


class CRangeErrors(ctypes.Structure):
    """qv::RangeErrors; what the fields mean stands in csrc/cpu/range_search.h."""

    _fields_ = (
        *((name, c_int64) for name in ("rows", "columns", "candidates")),
        *((name, c_void_p) for name in ("x", "inverse", "scale", "zero", "order", "error")),
        *((name, c_float) for name in ("qmin", "qmax", "margin")),
        *((name, c_int32) for name in ("real", "backend", "threads")),
    )


@cache
def _function() -> ctypes._NamedFuncPointer:
    loaded = library()
    loaded.qv_range_errors_size.restype = c_int64
    if loaded.qv_range_errors_size() != ctypes.sizeof(CRangeErrors):
        raise BuildError(f"the CPU library has a structure of {loaded.qv_range_errors_size()} bytes; remove it")
    loaded.qv_range_errors.argtypes = [c_void_p]
    loaded.qv_range_errors.restype = None
    return loaded.qv_range_errors


@lru_cache(maxsize=8)
def _order(candidates: int) -> Tensor:
    order = sorted(range(candidates), key=lambda index: (index % _COARSE != 0, index))
    return torch.tensor(order, dtype=torch.int32, device="cpu")


def refusal(rows: Tensor) -> str | None:
    """Why errors of these rows [R, C] are not computed here; None if they are."""
    if rows.device.type != "cpu" or rows.dtype is not torch.float32 or not rows.numel():
        return f"{rows.dtype} {list(rows.shape)} on {rows.device.type}"
    return missing_reason()


def range_errors(
    rows: Tensor, *, divisor: Tensor, scale: Tensor, zero: Tensor, codes: tuple[int, int], real: bool, margin: float
) -> Tensor:
    """Sums of |fake_quantize(row) - row|^2.4 for many scales of each row, to :data:`ACCURACY`.

    Args:
        rows: float32 [R, C].
        divisor: float32 [R, candidates]: what rows are divided by.
        scale: float32 [R, candidates]: what codes are multiplied by.
        zero: float32 [R, candidates]: zero points, in units of codes.
        codes: Smallest and largest code.
        real: Whether the zero point is added before codes are rounded.
        margin: A sum is given up, and a part of it returned, once it is above the row's least one so far times this.

    Returns:
        float32 [R, candidates].
    """
    count = divisor.shape[1]
    tensors = [
        rows.contiguous(),
        divisor.reciprocal().contiguous(),
        scale.contiguous(),
        zero.contiguous(),
        _order(count),
    ]
    error = torch.empty_like(tensors[1])
    call = CRangeErrors(
        *rows.shape,
        count,
        *(tensor.data_ptr() for tensor in tensors),
        error.data_ptr(),
        *codes,
        margin,
        real,
        BACKENDS[next(name for name in _VARIANTS if supported(name) is None)],
        torch.get_num_threads(),
    )
    _function()(ctypes.addressof(call))
    return error
