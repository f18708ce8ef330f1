"""torchao's linears beside the packed ones, where torchao can be imported; compiled, bfloat16 in and out.

``Int8DynamicActivationInt8WeightConfig`` has symmetric scales for each token and output, as torch._int_mm here;
``Float8DynamicActivationFloat8WeightConfig`` with ``PerRow`` the same in float8 e4m3 (compute capability 8.9 and up);
``Int4WeightOnlyConfig`` 4-bit weights in groups and activations as they are. They are its configurations since 0.18
(https://docs.pytorch.org/ao). A configuration or a kernel that is not there is the candidate's error in the table.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor, nn

from gpu.setting import Setting

__all__ = ["torchao_products"]


def torchao_products(x: Tensor, outputs: int, setting: Setting) -> dict[str, Callable[[], Tensor]]:
    """Candidates on rows x [M, K] with a random bfloat16 weight [outputs, K]; none where torchao is not installed.

    A layer is quantized and compiled at its first call, which raises what this torchao or this card does not have.
    """
    if importlib.util.find_spec("torchao") is None:
        return {}
    weight = torch.randn(outputs, x.shape[1], device=x.device).bfloat16() * 0.02
    names = ("W8A8 per token", "float8 per token", "W4A16")
    return {f"torchao {name}, compiled": _at_first_call(name, x, weight, setting) for name in names}


def _at_first_call(name: str, x: Tensor, weight: Tensor, setting: Setting) -> Callable[[], Tensor]:
    ready: list[Callable[[Tensor], Tensor]] = []

    def call() -> Tensor:
        with torch.no_grad():
            if not ready:
                ready.append(setting.compiled(_layer(name, weight)))
            return ready[0](x)

    return call


def _layer(name: str, weight: Tensor) -> nn.Linear:
    """A linear with a bias and torchao's weight in it."""
    from torchao import quantization

    layer = nn.Linear(weight.shape[1], weight.shape[0], device=weight.device, dtype=weight.dtype)
    layer.weight = nn.Parameter(weight)
    if name == "W8A8 per token":
        config = quantization.Int8DynamicActivationInt8WeightConfig()
    elif name == "float8 per token":
        config = quantization.Float8DynamicActivationFloat8WeightConfig(granularity=quantization.PerRow())
    else:
        config = quantization.Int4WeightOnlyConfig()
    quantization.quantize_(layer.requires_grad_(False), config)
    return layer
