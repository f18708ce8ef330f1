"""Double precision where a device has it, and the CPU's where it has not (Apple's GPUs, some of Intel's)."""

from __future__ import annotations

import torch
from torch import Tensor


def has_float64(device: torch.device) -> bool:
    """Whether a device computes in float64; a kind that is not known is asked for a tensor of it."""
    if device.type == "xpu" and torch.xpu.is_available():
        return bool(torch.xpu.get_device_properties(device).has_fp64)
    if device.type in ("cpu", "cuda", "meta", "mps"):
        return device.type != "mps"
    try:
        torch.empty(1, dtype=torch.float64, device=device)
    except (RuntimeError, TypeError):
        return False
    return True


def to_float64(tensor: Tensor) -> Tensor:
    """Convert a tensor to float64, on its own device, or on the CPU where that device has no float64."""
    return tensor.double() if has_float64(tensor.device) else tensor.cpu().double()
