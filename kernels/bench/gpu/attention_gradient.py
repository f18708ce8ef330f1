"""The gradient of attention in 8 bits on the card, by its Triton kernels, held to the reference on the CPU.

Kinds, sizes of heads, masks, clips, rotation and types are those of gpu.attention's random cases. A gradient's distance is
|found - wanted| / |wanted|; kernels/attention.md bounds it by 2e-3 and a rounding to the inputs' type. Every call is made
twice: a result that moves is a race.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from gpu.attention import Call, draw_call, same_bytes
from gpu.setting import Case, Row, Setting
from qvgen_kernels.attention import attention
from qvgen_kernels.attention.gradient import attention_gradients, reference_products
from qvgen_kernels.attention.triton.backend import triton_products

__all__ = ["cases"]

_BOUND = 2e-3
_LEAST_KEYS = 12
"""A query that sees one key has a gradient of 0, which nothing is relative to."""


def cases(setting: Setting, *, warm: bool = False) -> Iterator[Case]:  # noqa: ARG001 - every part has it
    """All cases; in a rehearsal one of each kind."""
    for seed in range(1 if setting.rehearse else 28):
        for kind in ("int8", "int8_qk"):
            yield f"{kind} {seed}", partial(_compare, setting, seed, kind)


def _compare(setting: Setting, seed: int, kind: str) -> Iterator[Row]:
    call = draw_call(setting, seed, kind=kind, damage=False, least=_LEAST_KEYS)
    q, _, v = call.inputs
    grad = torch.randn(q.shape, generator=torch.Generator().manual_seed(seed)).to(q.dtype)
    wanted = attention_gradients(
        grad,
        call.inputs,
        tensors=call.clips,
        spec=call.spec,
        products=partial(reference_products, dtype=v.dtype, mask=call.mask, spec=call.spec),
    )[:3]
    found = [_by_triton(call.on(setting.device), grad.to(setting.device), setting) for _ in range(2)]
    for name, tensor, again, part in zip("qkv", *found, wanted, strict=True):
        distance = _distance(tensor.double(), part.double())
        yield {
            "kernel": "triton",
            "kind": kind,
            "of": name,
            "distance": distance,
            "equal": distance < _BOUND + torch.finfo(q.dtype).eps,
            "steady": same_bytes(tensor, again),
        }


def _distance(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm().clamp(min=1e-30))


def _by_triton(call: Call, grad: Tensor, setting: Setting) -> list[Tensor]:
    """Gradients of q, k and v; in a rehearsal by the kernels themselves, which no operator takes to the interpreter."""
    if setting.rehearse:
        products = partial(triton_products, inputs=call.inputs, mask=call.mask, tensors=call.clips, spec=call.spec)
        return list(attention_gradients(grad, call.inputs, tensors=call.clips, spec=call.spec, products=products)[:3])
    inputs = [tensor.requires_grad_() for tensor in call.inputs]
    attention(*inputs, spec=call.spec, mask=call.mask, tensors=call.clips, kernel="triton").backward(grad)
    return [tensor.grad.cpu() for tensor in inputs if tensor.grad is not None]
