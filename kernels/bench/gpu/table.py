"""M x K -> N of every model: packed linears beside torch's products, interleaved, with the input's quantization.

Rows name the candidate as ``kernel w4a4``; ``quantize alone`` is the first of the two Triton kernels of a call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gpu.clock import Timer, by_events, by_wall, compare
from gpu.layer import Canonical
from gpu.models import Layer
from gpu.products import torch_products
from gpu.setting import WIDTHS, Case, Row, Setting
from gpu.torchao_products import torchao_products
from qvgen_kernels import LinearSpec, LinearTensors

__all__ = ["cases", "packed_calls"]


def cases(setting: Setting, *, warm: bool = False) -> Iterator[Case]:
    """One case for every shape of every model; shapes that two models share are measured once."""
    done = set()
    for model in setting.models():
        for layer in model.layers:
            key = (layer.rows, layer.columns, layer.outputs)
            if key not in done:
                done.add(key)
                yield f"{model.name} {layer.name}", partial(_rows, setting, model.name, layer, warm)


def _rows(setting: Setting, model: str, layer: Layer, warm: bool) -> Iterator[Row]:
    x = torch.randn(layer.rows, layer.columns, device=setting.device).bfloat16()
    calls = torch_products(x, layer.outputs, setting)
    if layer.name == "qkv":  # one shape of each model: all of them would take minutes to compile
        calls |= torchao_products(x, layer.outputs, setting)
    memory: dict[str, float] = {}
    for bits in WIDTHS[2:] if setting.rehearse else WIDTHS:
        for name, call, per_weight in packed_calls(x, layer, bits, setting):
            calls[name] = call
            memory[name] = per_weight
    timer: Timer = by_wall if setting.rehearse else by_events
    few = 1 if warm or setting.rehearse else None
    for name, found in compare(calls, timer=timer, rounds=few).items():
        row: Row = {
            "model": model, "layer": layer.name, "rows": layer.rows, "columns": layer.columns, "outputs": layer.outputs,
            "candidate": name, **found,
        }  # fmt: skip
        if "ms" in found:
            row["tops"] = layer.operations / found["ms"] / 1e9
        if name in memory:
            row["bytes_per_weight"] = memory[name]
        yield row


def packed_calls(
    x: Tensor, layer: Layer, bits: tuple[int, int], setting: Setting
) -> Iterator[tuple[str, Callable[[], Any], float]]:
    """Name, call and bytes per weight of every kernel that runs a layer; with bias, and nothing after it."""
    spec = LinearSpec(
        in_features=layer.columns, out_features=layer.outputs, weight_bits=bits[0], activation_bits=bits[1]
    )
    canonical = Canonical.random(spec, device=x.device)
    bias = torch.zeros(layer.outputs, device=x.device)
    label = f"w{bits[0]}a{bits[1]}"
    for kernel in setting.kernels(spec):
        packed = canonical.packed(kernel)
        yield f"{kernel} {label}", partial(packed, x, bias=bias), packed.bytes_per_weight
        if kernel == "triton" and bits[0] == bits[1]:
            from qvgen_kernels.triton.quantize import quantize_rows

            yield f"a{bits[1]} quantize alone", partial(quantize_rows, x, spec=spec, tensors=LinearTensors()), 0.0
