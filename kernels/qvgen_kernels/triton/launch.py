"""Launching a Triton kernel on the tensors' own device, with the options that the contract needs."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import triton
from torch import Tensor

__all__ = ["INTERPRETED", "OPTIONS", "launch", "sums_are_plain"]

OPTIONS = {"enable_fp_fusion": False}
"""A product and a sum are two operations of the contract: contracting them would change codes."""

INTERPRETED: bool = bool(triton.knobs.runtime.interpret)
"""Whether the kernels of this process run in Triton's interpreter: TRITON_INTERPRET=1 when they were imported."""


def sums_are_plain() -> bool:
    """Whether kernels do without inline assembly: in the interpreter, and on AMD cards."""
    return INTERPRETED or torch.version.hip is not None


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, on: Tensor, **options: int) -> None:
    """Launch a kernel on the device of ``on``; nothing waits for it.

    Args:
        kernel: A function under ``triton.jit``.
        grid: Programs in each direction.
        arguments: The kernel's.
        on: A tensor on the device.
        options: num_warps and num_stages.
    """
    elsewhere = on.device.type == "cuda" and on.device.index != torch.cuda.current_device()
    with torch.cuda.device(on.device) if elsewhere else contextlib.nullcontext():
        kernel[grid](*arguments, **options, **OPTIONS)
