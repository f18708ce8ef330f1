"""A call of the attention's Triton kernels, and what they need of a machine. Triton itself is imported at the first call."""

from __future__ import annotations

import torch
from torch import Tensor

from qvgen_kernels.attention.contract import AttentionSpec, AttentionTensors
from qvgen_kernels.contract import LinearSpec
from qvgen_kernels.triton.backend import _card_refusal, _missing

__all__ = ["NAME", "refusal", "triton_attention"]

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
    from qvgen_kernels.attention.triton.attend import attend
    from qvgen_kernels.attention.triton.quantize import quantize

    y = torch.empty_like(q, memory_format=torch.contiguous_format)
    if not q.numel() or not k.numel():
        return y.zero_()
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        codes = quantize(_rotated(q, spec), _rotated(k, spec), v, tensors=tensors, spec=spec)
        attend(codes, v, y=y, mask=mask, spec=spec)
    return y
