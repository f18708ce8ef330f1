"""A call of the attention's Triton kernels, and what they need of a machine. Triton itself is imported at the first call."""

from __future__ import annotations

import torch
from torch import Tensor

from qvgen_kernels.attention.contract import AttentionSpec, AttentionTensors
from qvgen_kernels.attention.gradient import Operands
from qvgen_kernels.contract import LinearSpec
from qvgen_kernels.triton.backend import _card_refusal, _missing

__all__ = ["NAME", "refusal", "triton_attention", "triton_products"]

NAME = "triton"


def refusal(device: torch.device) -> str | None:
    """Why the kernels do not run on a device; None where they do."""
    if device.type != "cuda":
        return f"it runs on CUDA and ROCm devices, and the tensors are on {device.type}"
    return _missing() or _card_refusal(device)


def _rotated(x: Tensor, spec: AttentionSpec) -> Tensor:
    """Queries or keys as the spec rotates them, float32; as they are where it does not."""
    if not spec.rotation:
        return x
    from qvgen_kernels.triton.rotate import rotate_rows

    layer = LinearSpec(
        in_features=spec.head_size, out_features=1, weight_bits=8, activation_bits=8, rotation=spec.rotation
    )
    return rotate_rows(x.reshape(-1, spec.head_size), spec=layer, input_scale=None).view(x.shape)


def triton_attention(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None, tensors: AttentionTensors, spec: AttentionSpec
) -> Tensor:
    """Attention as kernels/attention.md defines it; inputs as the operator has checked them. Nothing waits for the device.

    Args:
        q: Queries [B, H, M, D].
        k: Keys [B, H, N, D].
        v: Values [B, H, N, D].
        mask: bool, [B, H, M, N] or 1 in place of any of these sizes; None: every query sees every key.
        tensors: Clips.
        spec: The attention.

    Returns:
        [B, H, M, D] of q's dtype, contiguous.
    """
    from qvgen_kernels.attention.triton.attend import attend, attend_arguments
    from qvgen_kernels.attention.triton.quantize import quantize

    y = torch.empty_like(q, memory_format=torch.contiguous_format)
    if not q.numel() or not k.numel():
        return y.zero_()
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        codes = quantize(_rotated(q, spec), _rotated(k, spec), v, tensors=tensors, spec=spec)
        t, sizes, form = attend_arguments(codes, v, queries=q.shape[2], mask=mask, spec=spec)
        attend(t._replace(y=y), sizes, form)
    return y


def triton_products(
    grad: Tensor,
    operands: Operands,
    *,
    inputs: tuple[Tensor, Tensor, Tensor],
    mask: Tensor | None,
    tensors: AttentionTensors,
    spec: AttentionSpec,
) -> tuple[Tensor, Tensor, Tensor]:
    """The sums of the gradient, as :data:`~qvgen_kernels.attention.gradient.Products`. Nothing waits for the device.

    Args:
        grad: Gradient of the outputs, float32 [B, H, M, D], contiguous.
        operands: Quantized queries, keys and values.
        inputs: q, k and v of the forward pass; the codes of probabilities are made of them as there.
        mask: bool, [B, H, M, N] or 1 in place of any of these sizes; None: every query sees every key.
        tensors: Clips.
        spec: The attention.

    Returns:
        dq^ / lambda, dk^ / lambda and dv^.
    """
    from qvgen_kernels.attention.triton.gradient import products
    from qvgen_kernels.attention.triton.quantize import quantize

    q, k, v = inputs
    codes = quantize(_rotated(q, spec), _rotated(k, spec), v, tensors=tensors, spec=spec)
    return products(grad, operands, codes, value=v, mask=mask, spec=spec)
