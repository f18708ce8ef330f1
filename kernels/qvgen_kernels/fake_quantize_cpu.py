"""Fused fake quantization on the CPU: csrc/cpu/fake_quantize.*, in the library of the packed linear, on torch's threads.

The order in which a row's sum is added up is torch's (registers of eight numbers, four levels); whether this machine's torch
still adds like that is asked once, with numbers (:func:`_refusal`).
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Sequence
from ctypes import c_float, c_int32, c_int64, c_void_p
from functools import cache, lru_cache

import torch
from torch import Tensor

from qvgen_kernels.cpu_build import BuildError
from qvgen_kernels.cpu_library import BACKENDS, library, missing_reason, supported
from qvgen_kernels.fake_quantize import (
    RowSpec,
    check_gradient,
    check_output,
    gradient_outputs,
    quantized_outputs,
    register_implementation,
)

__all__ = ["VARIANTS"]

_log = logging.getLogger(__name__)

VARIANTS = ("vnni", "avx2", "portable")
"""Backends of the library with code of their own here, best first; vnni stands for AVX-512. One source, the same bits."""

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3}
_SCALE_DTYPES = {"float32": 0, "bfloat16": 1, "float16": 2}
_ARITHMETICS = {"reciprocal": 0, "division": 1, "unrounded": 2}
_KINDS = {"dynamic": 0, "static": 1, "learned": 2}
_ZEROS = {"none": 0, "integer": 1, "real": 2}


class CFakeQuantize(ctypes.Structure):
    """qv::FakeQuantize; what the fields mean stands in csrc/cpu/fake_quantize.h."""

    _fields_ = (
        *((name, c_int64) for name in ("rows", "groups", "columns")),
        ("x", c_void_p),
        *((name, c_int64) for name in ("x_row_stride", "params")),
        *((name, c_void_p) for name in ("first", "second", "low", "high", "scale", "zero", "row_sum", "operand")),
        *((name, c_void_p) for name in ("helper", "grad", "grad_x", "grad_first", "grad_second")),
        *((name, c_float) for name in ("floor", "ceiling", "factor")),
        *((name, c_int32) for name in ("x_dtype", "operand_dtype", "qmin", "qmax")),
        *((name, c_int32) for name in ("kind", "zero_kind", "arithmetic", "scale_dtype")),
        *((name, c_int32) for name in ("factored", "raw", "known", "stop_zero", "backend", "threads")),
    )


class CScaleOutput(ctypes.Structure):
    """qv::ScaleOutput."""

    _fields_ = (
        *((name, c_int64) for name in ("rows", "columns")),
        *((name, c_void_p) for name in ("y", "row_scale", "column_scale", "row_sum", "column_zero", "branch", "bias")),
        *((name, c_int32) for name in ("dtype", "backend", "threads")),
    )


class CScaleGradient(ctypes.Structure):
    """qv::ScaleGradient."""

    _fields_ = (
        *((name, c_int64) for name in ("rows", "columns")),
        *((name, c_void_p) for name in ("grad", "row_scale", "column_scale", "by_row", "by_column")),
        *((name, c_int32) for name in ("dtype", "backend", "threads")),
    )


@cache
def _functions() -> ctypes.CDLL:
    loaded = library()
    found = loaded.qv_fake_quantize_size
    found.restype = c_int64
    expected = sum(map(ctypes.sizeof, (CFakeQuantize, CScaleOutput, CScaleGradient)))
    if found() != expected:
        raise BuildError(f"the CPU library has structures of {found()} bytes, expected {expected}; remove it")
    for name in ("qv_fake_quantize", "qv_scale_output", "qv_scale_gradient"):
        getattr(loaded, name).argtypes = [c_void_p]
        getattr(loaded, name).restype = None
    return loaded


@cache
def _backend() -> int:
    return BACKENDS[next(name for name in VARIANTS if supported(name) is None)]


@lru_cache(maxsize=1024)
def _template(text: str) -> CFakeQuantize:
    """The part of a call's structure that the spec decides, by its text: a text knows its hash, and a spec does not."""
    spec = RowSpec.from_string(text)
    return CFakeQuantize(
        columns=spec.group,
        floor=spec.floor,
        ceiling=spec.ceiling,
        factor=spec.factor,
        qmin=spec.qmin,
        qmax=spec.qmax,
        kind=_KINDS[spec.kind],
        zero_kind=_ZEROS[spec.zero_point],
        arithmetic=_ARITHMETICS[spec.arithmetic],
        scale_dtype=_SCALE_DTYPES[spec.scale_dtype],
        factored=spec.factored,
        raw=spec.raw,
        stop_zero=not spec.through_zero_point,
    )


def _call(text: str, rows: int, columns: int, params: Sequence[Tensor]) -> CFakeQuantize:
    """A structure without tensors but ``params``, which are dense and which the caller keeps."""
    template = _template(text)
    call = CFakeQuantize.from_buffer_copy(template)
    call.rows, call.groups = rows, columns // template.columns
    call.params = call.groups if template.kind == _KINDS["learned"] else 1
    call.first = params[0].data_ptr()
    if len(params) == 2:
        call.second = params[1].data_ptr()
    call.backend, call.threads = _backend(), torch.get_num_threads()
    return call


def _dense(value: Tensor) -> Tensor:
    """A vector as the library reads it; most are."""
    return value if value.dtype is torch.float32 and value.is_contiguous() else value.float().contiguous()


def _dense_or_none(value: Tensor | None) -> Tensor | None:
    return None if value is None else _dense(value)


def _give_x(call: CFakeQuantize, x: Tensor) -> None:
    call.x, call.x_row_stride, call.x_dtype = x.data_ptr(), x.stride(0), _DTYPES[x.dtype]


def _quantize_rows(
    x: Tensor, params: Sequence[Tensor], helper: Tensor | None, spec: str, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    parsed, params, helper = RowSpec.from_string(spec), [*map(_dense, params)], _dense_or_none(helper)
    made = quantized_outputs(x, parsed, dtype)
    operand, scale, zero, low, high, row_sum = made
    call = _call(spec, x.shape[0], x.shape[1], params)
    _give_x(call, x)
    call.operand, call.operand_dtype, call.scale = operand.data_ptr(), _DTYPES[dtype], scale.data_ptr()
    if parsed.zero_point == "real":
        call.zero = zero.data_ptr()
    if parsed.kind == "dynamic":
        call.low, call.high = low.data_ptr(), high.data_ptr()
    if parsed.row_sums:
        call.row_sum = row_sum.data_ptr()
    if helper is not None:
        call.helper = helper.data_ptr()
    _functions().qv_fake_quantize(ctypes.addressof(call))
    return made


def _row_scales(extremes: Sequence[Tensor], params: Sequence[Tensor], spec: str) -> Tensor:
    parsed, params = RowSpec.from_string(spec), [*map(_dense, params)]
    low, high = map(_dense, extremes)
    scale = torch.empty_like(low)
    groups = low.numel() // max(1, params[0].numel())
    call = _call(spec, params[0].numel(), groups * parsed.group, params)
    call.low, call.high, call.known, call.scale = low.data_ptr(), high.data_ptr(), 1, scale.data_ptr()
    _functions().qv_fake_quantize(ctypes.addressof(call))
    return scale


def _quantize_rows_backward(
    grad: Tensor,
    x: Tensor,
    params: Sequence[Tensor],
    extremes: Sequence[Tensor],
    spec: str,
    dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    check_gradient(grad, x)
    parsed, params, extremes = RowSpec.from_string(spec), [*map(_dense, params)], [*map(_dense, extremes)]
    operand, grad_first, grad_second = gradient_outputs(x, parsed, dtype)
    call = _call(spec, x.shape[0], x.shape[1], params)
    _give_x(call, x)
    if dtype is not None:
        call.operand, call.operand_dtype = operand.data_ptr(), _DTYPES[dtype]
    if extremes:
        call.low, call.high, call.known = extremes[0].data_ptr(), extremes[1].data_ptr(), 1
    call.grad = call.grad_x = grad.data_ptr()
    call.grad_first, call.grad_second = grad_first.data_ptr(), grad_second.data_ptr()
    _functions().qv_fake_quantize(ctypes.addressof(call))
    return operand, grad_first, grad_second


def _scale_output(
    y: Tensor,
    row_scale: Tensor | None,
    column_scale: Tensor | None,
    row_sum: Tensor | None,
    column_zero: Tensor | None,
    branch: Tensor | None,
    bias: Tensor | None,
) -> None:
    check_output(y)
    vectors = [_dense_or_none(value) for value in (row_scale, column_scale, row_sum, column_zero)]
    tensors = (*vectors, None if branch is None else branch.to(y.dtype).contiguous(), _dense_or_none(bias))
    addresses = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
    call = CScaleOutput(
        y.shape[0], y.shape[1], y.data_ptr(), *addresses, _DTYPES[y.dtype], _backend(), torch.get_num_threads()
    )
    _functions().qv_scale_output(ctypes.addressof(call))


def _scale_gradient(grad: Tensor, row_scale: Tensor, column_scale: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    grad, row_scale, column_scale = grad.contiguous(), row_scale.contiguous(), column_scale.contiguous()
    by_row, by_column = torch.empty_like(grad, dtype=dtype), torch.empty_like(grad, dtype=dtype)
    tensors = (grad, row_scale, column_scale, by_row, by_column)
    addresses = [tensor.data_ptr() for tensor in tensors]
    call = CScaleGradient(*grad.shape, *addresses, _DTYPES[dtype], _backend(), torch.get_num_threads())
    _functions().qv_scale_gradient(ctypes.addressof(call))
    return by_row, by_column


@cache
def _refusal() -> str | None:
    """Why the library is not used here: there is none, or torch adds rows up in an order of its own."""
    if (reason := missing_reason()) is not None:
        return reason
    draw = torch.Generator().manual_seed(0)
    for columns in (8, 31, 77, 1000, 9000):
        x, grad = (torch.randn(3, columns, generator=draw, device="cpu") for _ in range(2))
        ones, zeros = torch.ones(3, 1, device="cpu"), torch.zeros(3, 1, device="cpu")
        spec = RowSpec(kind="static", qmin=0, qmax=1, zero_point="integer", group=columns)
        kept = torch.where((x.round() >= 0) & (x.round() <= 1), grad, 0.0)
        codes = x.round().clamp(0, 1)
        expected = (grad * codes).sum(-1) - (kept * x).sum(-1), (kept - grad).sum(-1)
        _, first, second = _quantize_rows_backward(grad.clone(), x, [ones, zeros], [], spec.to_string(), None)
        if not (torch.equal(first[:, 0], expected[0]) and torch.equal(second[:, 0], expected[1])):
            reason = (
                f"torch {torch.__version__} sums rows of {columns} numbers in another order than the fused operators"
            )
            _log.info("fake quantization is not fused: %s", reason)
            return reason
    return None


register_implementation(
    "cpu",
    {
        "quantize_rows": _quantize_rows,
        "row_scales": _row_scales,
        "quantize_rows_backward": _quantize_rows_backward,
        "scale_output": _scale_output,
        "scale_gradient": _scale_gradient,
    },
    refusal=_refusal,
    direct=True,
)
