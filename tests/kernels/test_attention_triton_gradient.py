"""The Triton kernels of the attention's gradient, interpreted on the CPU, against the derivative of a float64 function.

Probabilities are held to the reference's by the sums for values of one query, which are these alone. What the interpreter
can't show is the compiled code: test_triton_code.py looks at that. Nothing ran on a GPU.
"""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

from qvgen_kernels.attention import AttentionSpec, AttentionTensors
from qvgen_kernels.attention.gradient import _operands, attention_gradients, reference_products
from qvgen_kernels.attention.triton.backend import triton_products
from tests.kernels.attention_gradient_oracle import gradients
from tests.kernels.test_attention_gradient import ROUNDING, as_spec, distance, numbers
from tests.kernels.triton_interpreter import _quiet_numpy, attention_attend, attention_gradient

pytest.importorskip(
    "triton", minversion="3.9", reason="asserted with an interpreter whose fused multiply-add rounds once"
)
__all__ = ["_quiet_numpy"]

ELEVEN_BITS = 2e-3
"""Bound of a gradient's relative error where one factor of each product has eleven bits (gradient.py)."""


def found_by(kernel, tensors, *, spec, mask=None, clips=(None, None)):
    """Gradients of q, k, v and both clips, through the chain around the products."""
    *inputs, grad = tensors
    named, given = AttentionTensors(*clips), {"mask": mask, "spec": spec}
    products = partial(reference_products, dtype=inputs[2].dtype, **given)
    if kernel == "triton":
        products = partial(triton_products, inputs=tuple(inputs), tensors=named, **given)
    return attention_gradients(grad, tuple(inputs), tensors=named, spec=spec, products=products)


def seen(*shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(3)) > 0.4


@pytest.mark.parametrize(
    ("shape", "kind", "dtype", "mask", "rounded"),
    [
        ((1, 1, 3, 66, 64), "int8", torch.float32, None, False),
        ((1, 2, 66, 5, 64), "int8", torch.float16, (1, 2, 66, 5), False),
        ((1, 1, 3, 67, 128), "int8", torch.bfloat16, (1, 1, 1, 67), True),
        ((1, 1, 3, 65, 128), "int8_qk", torch.bfloat16, (1, 1, 3, 65), False),
        ((1, 1, 3, 7, 72), "int8_qk", torch.float32, None, True),
    ],
    ids=str,
)
def test_gradients_are_those_of_the_oracle(shape, kind, dtype, mask, rounded, monkeypatch):
    """By a bound of float32 sums where factors keep their bits, and by that of gradient.py where they have eleven."""
    if not rounded:
        for module in (attention_attend, attention_gradient):
            monkeypatch.setattr(module, "eleven_bits", lambda v: v)
    tensors, spec = numbers(shape, size=2.0, dtype=dtype), AttentionSpec(shape[4], kind=kind)
    mask = torch.ones(1, 1, 1, 1, dtype=torch.bool) if mask is None else seen(*mask)
    clips = torch.linspace(0.7, 1.0, shape[1]), torch.linspace(1.0, 0.8, shape[1])
    found = found_by("triton", tensors, spec=spec, mask=mask if mask.numel() > 1 else None, clips=clips)
    every, bound = mask.expand(*shape[:4]), ELEVEN_BITS if rounded else ROUNDING
    for head in range(shape[1]):
        *point, grad = (tensor[0, head].float().numpy() for tensor in tensors)
        pair = tuple(clip[head].item() for clip in clips)
        _, wanted = gradients(point, grad, clips=pair, seen=every[0, head].numpy(), spec=as_spec(spec, dtype))
        for tensor, part in zip(found[:3], wanted[:3], strict=True):
            assert tensor.dtype is dtype
            assert distance(tensor[0, head], part) < bound + torch.finfo(dtype).eps / 2
        for tensor, part, of in zip(found[3:], wanted[3:], wanted[:2], strict=True):
            assert abs(tensor[head] - part) < bound * of.norm() * math.sqrt(shape[4])


@pytest.mark.parametrize("kind", ["int8", "int8_qk"])
def test_a_query_that_sees_nothing_and_blocks_without_keys_give_the_reference_s(kind):
    tensors, spec = numbers((2, 1, 4, 70, 8)), AttentionSpec(8, rotation=8, smooth_key=False, kind=kind)
    mask = seen(1, 1, 4, 70)
    mask[..., 2, :], mask[..., 3, :64] = False, False
    found, wanted = (found_by(kernel, tensors, spec=spec, mask=mask) for kernel in ("triton", "reference"))
    for tensor, part in zip(found, wanted, strict=True):
        assert distance(tensor, part.double()) < ELEVEN_BITS
    assert not found[0][:, :, 2].any()


def test_what_is_not_finite_stays_in_its_head():
    tensors, spec = numbers((1, 2, 3, 6, 8)), AttentionSpec(8)
    clean = found_by("triton", tensors, spec=spec)
    for place in range(3):
        damaged = [tensor.clone() for tensor in tensors]
        damaged[place][0, 1, 2, 5] = torch.nan
        found = found_by("triton", damaged, spec=spec)
        assert all(torch.equal(tensor[:, 0], part[:, 0]) for tensor, part in zip(found[:3], clean[:3], strict=True))
        assert all(tensor[0, 1].isnan().all() for tensor in found[1:3])
        assert found[0][0, 1, 2].isnan().all()
        if place == 0:  # a query damages no other query
            assert torch.equal(found[0][0, 1, :2], clean[0][0, 1, :2])


@pytest.mark.parametrize(("kind", "dtype"), [("int8", torch.float32), ("int8_qk", torch.float16)])
def test_probabilities_are_the_forward_pass_s_to_the_bit(kind, dtype, monkeypatch):
    """With one query and a gradient of ones the sums for values are P itself."""
    for module in (attention_attend, attention_gradient):
        monkeypatch.setattr(module, "eleven_bits", lambda v: v)
    q, k, v, grad = numbers((1, 1, 1, 130, 8), size=3.0, dtype=dtype)
    spec, (query, key, value) = AttentionSpec(8, kind=kind), (q, k, v)
    operands = _operands((query, key, value), tensors=AttentionTensors(), spec=spec)
    ones = torch.ones_like(grad).float()
    given = {"mask": None, "spec": spec}
    *_, found = triton_products(ones, operands, inputs=(q, k, v), tensors=AttentionTensors(), **given)
    *_, wanted = reference_products(ones, operands, dtype=dtype, **given)
    assert torch.equal(wanted, wanted[..., :1].expand_as(wanted))
    torch.testing.assert_close(found, wanted, rtol=2**-22 if kind == "int8" else 0, atol=0)  # s (1 / s), and P alone
    assert wanted.any()
