"""Which way of computing a function gives torch's bits on a device: all numbers of 16 bits are tried, once in a process.

torch's GELU and SiLU differ in last bits from one version and device to the next, and a packed model is to give what the
fake-quantized one gives, which runs torch's. A function of a 16-bit number has 65 536 inputs, so that equality can be seen
instead of assumed. Where no variant is equal, and for float32, torch's own operator runs before the kernel.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from qvgen_kernels.triton.launch import INTERPRETED, launch
from qvgen_kernels.triton.steps import VARIANTS, function_kernel

__all__ = ["torch_function", "variant_of"]

_NUMBERS = 65536
_PER_PROGRAM = 4096


@cache
def variant_of(function: str, dtype: torch.dtype, device: torch.device) -> str | None:
    """The variant (steps.py) that equals torch's function on every number of a type; None: none does.

    The first question for a device waits for it, as compiling does; later ones do nothing.

    Args:
        function: "none", "gelu_tanh" or "silu".
        dtype: T.
        device: Where it is to run.
    """
    if function == "none":
        return "none"
    if dtype not in (torch.bfloat16, torch.float16):
        return None
    with torch.no_grad():
        x = torch.arange(_NUMBERS, dtype=torch.int32, device=device).to(torch.int16).view(dtype)
        expected = torch_function(x, function)
        return next((variant for variant in VARIANTS[function] if _equal(computed(x, variant), expected)), None)


def torch_function(x: Tensor, function: str) -> Tensor:
    """Torch's operator."""
    return functional.gelu(x, approximate="tanh") if function == "gelu_tanh" else functional.silu(x)


def computed(x: Tensor, variant: str) -> Tensor:
    """A variant's results for a multiple of 4096 numbers."""
    y = torch.empty_like(x)
    launch(function_kernel, (x.numel() // _PER_PROGRAM,), x, y, _PER_PROGRAM, variant, INTERPRETED, on=x, num_warps=4)
    return y


def _equal(found: Tensor, expected: Tensor) -> bool:
    """Equal numbers, where one NaN is as good as another; a zero's sign, which no code depends on, does not count."""
    return bool(((found == expected) | (found.isnan() & expected.isnan())).all())
