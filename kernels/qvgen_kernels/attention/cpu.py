"""The quantized attention and the sums of its gradient on a CPU: csrc/cpu/attention*, on torch's threads."""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int32, c_int64, c_void_p
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from qvgen_kernels.attention.contract import BLOCK, AttentionSpec, AttentionTensors
from qvgen_kernels.attention.gradient import Operands
from qvgen_kernels.attention.reference import rotated
from qvgen_kernels.cpu_build import BuildError
from qvgen_kernels.cpu_library import BACKENDS, library

__all__ = ["VARIANTS", "cpu_attention", "cpu_products"]

VARIANTS = ("amx", "vnni", "avxvnni", "avx2", "neon", "portable")
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
        *((name, c_int32) for name in ("score_dtype", "value_dtype", "smooth_key", "backend", "threads", "plain")),
    )


class CAttentionGradient(ctypes.Structure):
    """qv::AttentionGradient."""

    _fields_ = (
        ("call", CAttention),
        *((name, c_void_p) for name in ("grad", "query", "key", "value", "grad_query", "grad_key", "grad_value")),
    )


@cache
def _functions() -> ctypes.CDLL:
    loaded = library()
    loaded.qv_attention_size.restype = c_int64
    if loaded.qv_attention_size() != ctypes.sizeof(CAttentionGradient):
        raise BuildError(f"the CPU library has a structure of {loaded.qv_attention_size()} bytes; remove it")
    loaded.qv_attention_work_bytes.argtypes = [c_void_p]
    loaded.qv_attention_work_bytes.restype = c_int64
    for function in (loaded.qv_attention, loaded.qv_attention_gradient):
        function.argtypes = [c_void_p]
        function.restype = None
    return loaded


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
    y = torch.empty(q.shape, dtype=v.dtype, device=v.device)
    call = _call((q, k, v), y, mask=mask, tensors=tensors, spec=spec, variant=variant)
    _functions().qv_attention(ctypes.addressof(call))
    return y


def _call(
    inputs: tuple[Tensor, Tensor, Tensor],
    y: Tensor | None,
    *,
    mask: Tensor | None,
    tensors: AttentionTensors,
    spec: AttentionSpec,
    variant: str,
) -> CAttention:
    """A structure that keeps what it points to, y and mask aside, as its attribute ``kept``."""
    q, k, v = inputs
    query, key, value = _dense(rotated(q, spec=spec)), _dense(rotated(k, spec=spec)), _dense(v)
    clips = [None if clip is None else clip.contiguous() for clip in tensors]
    call = CAttention(
        *q.shape[:3],
        k.shape[2],
        spec.head_size,
        *(tensor.data_ptr() for tensor in (query, key, value)),
        None if y is None else y.data_ptr(),
        *(tensor.stride(axis) for tensor in (query, key, value) for axis in range(3)),
        *((0, 0, 0) if y is None else y.stride()[:3]),
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
        spec.probability_type(v.dtype) is not None,
    )
    work_bytes = _functions().qv_attention_work_bytes(ctypes.addressof(call))
    work = torch.empty(work_bytes + _ALIGNMENT, dtype=torch.uint8, device=v.device)
    call.work = work.data_ptr() + -work.data_ptr() % _ALIGNMENT
    call.kept = (query, key, value, *clips, work)
    return call


def cpu_products(
    grad: Tensor,
    operands: Operands,
    *,
    inputs: tuple[Tensor, Tensor, Tensor],
    mask: Tensor | None,
    tensors: AttentionTensors,
    spec: AttentionSpec,
    variant: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The sums of the gradient, as :data:`~qvgen_kernels.attention.gradient.Products`: the same bits by every variant.

    Args:
        grad: Gradient of the outputs, float32 [B, H, M, D].
        operands: Quantized queries, keys and values.
        inputs: q, k and v of the forward pass; the codes of probabilities are made of them as there.
        mask: bool, [B, H, M, N] or 1 in place of any of these sizes; None: every query sees every key.
        tensors: Clips.
        spec: The attention.
        variant: One of :data:`VARIANTS`.

    Returns:
        dq^ / lambda, dk^ / lambda and dv^.

    Raises:
        KernelUnavailableError: there is no library.
    """
    columns, keys = (-spec.head_size % 16, -inputs[1].shape[2] % BLOCK)  # what is missing to whole registers and blocks
    query = pad(operands.query.dequantized, (0, columns)).contiguous()
    key = pad(operands.key.dequantized, (0, columns, 0, keys)).contiguous()
    value = pad(operands.value.dequantized, (0, columns, 0, keys)).unflatten(2, (-1, BLOCK)).mT.contiguous()
    of_query, of_key, of_value = torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(key)
    read = (pad(grad, (0, columns)).contiguous(), query, key, value)
    forward = _call(inputs, None, mask=mask, tensors=tensors, spec=spec, variant=variant)
    call = CAttentionGradient(
        forward,  # copied: what it keeps is kept by this name
        *(tensor.data_ptr() for tensor in (*read, of_query, of_key, of_value)),
    )
    _functions().qv_attention_gradient(ctypes.addressof(call))
    of_key, of_value = (part[:, :, : inputs[1].shape[2], : spec.head_size] for part in (of_key, of_value))
    return of_query[..., : spec.head_size], of_key, of_value
