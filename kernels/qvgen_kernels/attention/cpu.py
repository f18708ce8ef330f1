"""The quantized attention on a CPU: csrc/cpu/attention*, on torch's threads."""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int32, c_int64, c_void_p
from functools import cache

import torch
from torch import Tensor

from qvgen_kernels.attention.contract import AttentionSpec, AttentionTensors
from qvgen_kernels.attention.reference import rotated
from qvgen_kernels.cpu_build import BuildError
from qvgen_kernels.cpu_library import BACKENDS, library

__all__ = ["VARIANTS", "cpu_attention"]

VARIANTS = ("amx", "vnni", "avx2", "portable")
"""Processors that the attention is compiled for, the fastest first."""

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_ALIGNMENT = 64


class CAttention(ctypes.Structure):
    """qv::Attention; what the fields mean stands in csrc/cpu/attention.h."""

    _fields_ = (
        *((name, c_int64) for name in ("batch", "heads", "queries", "keys", "head_size")),
        *((name, c_void_p) for name in ("q", "k", "v", "y")),
        *((f"{tensor}_{size}", c_int64) for tensor in "qkvy" for size in ("batch", "head", "row")),
        ("mask", c_void_p),
        *((f"mask_{size}", c_int64) for size in ("batch", "head", "row", "key")),
        *((name, c_void_p) for name in ("query_clip", "key_clip", "work")),
        ("factor", c_float),
        *((name, c_int32) for name in ("score_dtype", "value_dtype", "smooth_key", "backend", "threads")),
    )


@cache
def _functions() -> tuple[ctypes._NamedFuncPointer, ctypes._NamedFuncPointer]:
    loaded = library()
    loaded.qv_attention_size.restype = c_int64
    if loaded.qv_attention_size() != ctypes.sizeof(CAttention):
        raise BuildError(f"the CPU library has a structure of {loaded.qv_attention_size()} bytes; remove it")
    loaded.qv_attention_work_bytes.argtypes = [c_void_p]
    loaded.qv_attention_work_bytes.restype = c_int64
    loaded.qv_attention.argtypes = [c_void_p]
    loaded.qv_attention.restype = None
    return loaded.qv_attention_work_bytes, loaded.qv_attention


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _strides(mask: Tensor | None) -> tuple[int, ...]:
    if mask is None:
        return (0, 0, 0, 0)
    return tuple(0 if size == 1 else stride for size, stride in zip(mask.shape, mask.stride(), strict=True))


def cpu_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None,
    tensors: AttentionTensors,
    spec: AttentionSpec,
    variant: str,
) -> Tensor:
    """Attention as kernels/attention.md defines it, by one of the variants that run on this machine.

    Args:
        q: Queries [B, H, M, D].
        k: Keys [B, H, N, D].
        v: Values [B, H, N, D].
        mask: bool, [B, H, M, N] or 1 in place of any of these sizes; None: every query sees every key.
        tensors: Clips.
        spec: The attention.
        variant: One of :data:`VARIANTS`.

    Returns:
        [B, H, M, D] of q's dtype, contiguous.

    Raises:
        KernelUnavailableError: there is no library.
    """
    if not q.numel() or not k.numel():
        return torch.zeros_like(q, memory_format=torch.contiguous_format)
    query, key, value = _dense(rotated(q, spec=spec)), _dense(rotated(k, spec=spec)), _dense(v)
    y = torch.empty(q.shape, dtype=v.dtype, device=v.device)
    clips = [None if clip is None else clip.contiguous() for clip in tensors]
    call = CAttention(
        *q.shape[:3],
        k.shape[2],
        spec.head_size,
        *(tensor.data_ptr() for tensor in (query, key, value, y)),
        *(tensor.stride(axis) for tensor in (query, key, value, y) for axis in range(3)),
        None if mask is None else mask.data_ptr(),
        *_strides(mask),
        *(None if clip is None else clip.data_ptr() for clip in clips),
        None,
        spec.score_factor,
        _DTYPES[query.dtype],
        _DTYPES[value.dtype],
        spec.smooth_key,
        BACKENDS[variant],
        torch.get_num_threads(),
    )
    work_bytes, run = _functions()
    work = torch.empty(work_bytes(ctypes.addressof(call)) + _ALIGNMENT, dtype=torch.uint8, device=v.device)
    call.work = work.data_ptr() + -work.data_ptr() % _ALIGNMENT
    run(ctypes.addressof(call))
    return y
