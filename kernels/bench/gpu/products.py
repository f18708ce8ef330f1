"""Products of torch that the packed linears are compared with: bfloat16, 8-bit integers, 8-bit floats."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from gpu.setting import Setting

__all__ = ["BF16", "torch_products"]

BF16 = "F.linear bf16"
_FP8_LARGEST = 448.0


def _int8(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Symmetric 8-bit codes for every token, torch._int_mm, scales in float32."""
    row = x.float().abs().amax(1, keepdim=True).clamp(min=1e-8) / 127
    sums = torch._int_mm((x.float() / row).round().to(torch.int8), codes)
    return (sums.float() * row * scale + bias).to(x.dtype)


def _fp8(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Numbers of float8 e4m3 with a scale for every token and output, torch._scaled_mm; the bias is added in bfloat16."""
    row = x.float().abs().amax(1, keepdim=True).clamp(min=1e-8) / _FP8_LARGEST
    rounded = (x.float() / row).to(torch.float8_e4m3fn)
    return torch._scaled_mm(rounded, codes, scale_a=row, scale_b=scale, out_dtype=x.dtype) + bias.to(x.dtype)


def torch_products(x: Tensor, outputs: int, setting: Setting) -> dict[str, Callable[[], Tensor]]:
    """Candidates on rows x [M, K], each with its own random weight [outputs, K] and a bias.

    What the device does not have raises at its first call.
    """
    weight = torch.randn(outputs, x.shape[1], device=x.device).bfloat16() * 0.02
    bias = torch.zeros(outputs, device=x.device)
    narrow = bias.bfloat16()
    scale = weight.float().abs().amax(1).clamp(min=1e-8)
    codes = (weight.float() / (scale / 127)[:, None]).round().to(torch.int8).t()
    eight = setting.compiled(_int8, dynamic=True)
    candidates: dict[str, Callable[[], Tensor]] = {
        BF16: lambda: functional.linear(x, weight, narrow),
        "torch._int_mm + scaling, compiled": lambda: eight(x, codes, scale / 127, bias),
    }
    if hasattr(torch, "float8_e4m3fn") and hasattr(torch, "_scaled_mm"):
        small = (weight.float() / (scale / _FP8_LARGEST)[:, None]).to(torch.float8_e4m3fn).t()
        floats = setting.compiled(_fp8, dynamic=True)
        by_output = (scale / _FP8_LARGEST)[None, :].contiguous()
        candidates["fp8 torch._scaled_mm, compiled"] = lambda: floats(x, small, by_output, bias)
        ones = torch.ones(len(x), 1, device=x.device)
        ready = x.to(torch.float8_e4m3fn)
        candidates["fp8 torch._scaled_mm, product alone"] = lambda: torch._scaled_mm(
            ready, small, scale_a=ones, scale_b=by_output, out_dtype=torch.bfloat16
        )
    return candidates
