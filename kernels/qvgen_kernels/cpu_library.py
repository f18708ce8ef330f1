"""The built CPU library as Python sees it: its one structure, its functions, what this machine runs.

``CLinear`` mirrors ``qv::Linear`` of csrc/cpu/qv.h field by field; the library tells its own size and one of another size is
refused. ctypes is enough: a call costs some microseconds, and nothing here depends on torch's or Python's version.
"""

from __future__ import annotations

import ctypes
import logging
from ctypes import c_float, c_int32, c_int64, c_void_p
from functools import cache

from qvgen_kernels.cpu_build import BuildError, library_path
from qvgen_kernels.errors import KernelUnavailableError

__all__ = ["BACKENDS", "CLinear", "library", "missing_reason", "open_library", "supported"]

_log = logging.getLogger(__name__)

BACKENDS = {"portable": 0, "avx2": 1, "avxvnni": 2, "vnni": 3, "amx": 4, "neon": 5}
"""Numbers of the backends in the library; avxvnni belongs to kernel=avx2."""


class CLinear(ctypes.Structure):
    """qv::Linear; what the fields mean stands in csrc/cpu/qv.h."""

    _fields_ = (
        *((name, c_int64) for name in ("rows", "in_features", "out_features", "padded_in", "padded_out")),
        *((name, c_int64) for name in ("group", "groups", "padded_group", "weight_groups", "activation_groups")),
        *((name, c_int64) for name in ("rotation", "paley")),
        ("x", c_void_p),
        ("x_row_stride", c_int64),
        ("x_column_stride", c_int64),
        ("y", c_void_p),
        ("y_row_stride", c_int64),
        *((name, c_void_p) for name in ("weight", "weight_scale", "column_sum", "weight_shift", "weight_zero")),
        *((name, c_void_p) for name in ("bias", "clip_low", "clip_high", "input_scale", "row_scale", "row_zero")),
        *((name, c_void_p) for name in ("branch", "gate", "residual", "paley_terms")),
        *((name, c_void_p) for name in ("accumulators", "operands", "scales")),
        *((name, c_int64) for name in ("gate_rows", "gate_row_stride", "residual_row_stride")),
        ("rotation_scale", c_float),
        *((name, c_int32) for name in ("dtype", "activation_qmax", "symmetric", "activation_bits", "scale_dtype")),
        *((name, c_int32) for name in ("weight_bound", "function", "gate_float32", "arithmetic")),
        *((name, c_int32) for name in ("backend", "threads")),
    )


def open_library(path: str) -> ctypes.CDLL:
    """Load a built library and declare its functions.

    Raises:
        BuildError: it can't be loaded or was built from another structure.
    """
    try:
        loaded = ctypes.CDLL(path)
        loaded.qv_linear_size.restype = c_int64
        size = loaded.qv_linear_size()
    except (OSError, AttributeError) as error:
        raise BuildError(f"{path} can't be loaded ({error}); remove it, it is built anew") from error
    if size != ctypes.sizeof(CLinear):
        raise BuildError(f"{path} has a structure of {size} bytes, expected {ctypes.sizeof(CLinear)}; remove it")
    loaded.qv_linear.argtypes = [ctypes.POINTER(CLinear)]
    loaded.qv_exercise.argtypes = [c_int32, c_int64]
    loaded.qv_exercise.restype = c_int64
    loaded.qv_prepack.argtypes = [c_void_p]
    loaded.qv_prepack.restype = None
    loaded.qv_prepack_size.restype = c_int64
    loaded.qv_set_pool.argtypes = [c_void_p]
    loaded.qv_set_pool.restype = None
    pool = _torch_pool()
    if pool is not None:
        loaded.qv_set_pool(pool)
    return loaded


def _torch_pool() -> int | None:
    """Address of GOMP_parallel in the OpenMP library that torch has loaded into this process; None if there is none."""
    try:
        return ctypes.cast(ctypes.CDLL(None).GOMP_parallel, c_void_p).value
    except (OSError, AttributeError, TypeError):
        return None


@cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    try:
        return open_library(str(library_path())), ""
    except BuildError as error:
        _log.warning("packed layers on the CPU run on the reference, which is slow, because: %s", error)
        return None, str(error)


def library() -> ctypes.CDLL:
    """The library of this machine, built at the first call.

    Raises:
        RuntimeError: there is none; the text says why and what to do.
    """
    loaded, reason = _load()
    if loaded is None:
        raise KernelUnavailableError(reason)
    return loaded


def missing_reason() -> str | None:
    """Why there is no library; None if there is one. Warns once where there is none."""
    return _load()[1] or None


@cache
def supported(backend: str) -> str | None:
    """Why a backend does not run on this machine; None if it does."""
    if (reason := missing_reason()) is not None:
        return reason
    answer = library().qv_supported(BACKENDS[backend])
    if answer == -2:
        _log.warning("this CPU has AMX, but the kernel refused its use (arch_prctl); the next backend is taken")
    return {
        1: None,
        0: f"this CPU lacks the instructions of {backend}",
        -1: f"{backend} is for another kind of CPU",
        -2: "the operating system refused the use of AMX tiles",
    }[answer]
