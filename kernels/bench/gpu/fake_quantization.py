"""A training step of one fake-quantized layer: its forward and backward pass, fused and by torch alone, interleaved.

Where the device has no fused operators that is what the row says. The bits of all outputs and gradients are compared.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor, nn

from gpu.clock import by_events, by_wall, compare
from gpu.models import Layer
from gpu.setting import Case, Row, Setting

WIDTHS = ((4, 4), (3, 3))


def cases(setting: Setting, *, warm: bool = False) -> Iterator[Case]:
    """The feed-forward's two layers of every model."""
    for model in setting.models():
        for layer in model.layers[-2:]:
            for bits in WIDTHS:
                name = f"{model.name} {layer.name} w{bits[0]}a{bits[1]}"
                yield name, partial(_rows, setting, model.name, layer, bits, warm)


def _rows(setting: Setting, model: str, layer: Layer, bits: tuple[int, int], warm: bool) -> Iterator[Row]:
    from qvgen.initializers.rtn import RoundToNearest
    from qvgen.layers.fake_quant_linear import FakeQuantLinear
    from qvgen.layers.fused_product import unfused
    from qvgen.layers.noise_band import NoiseBand
    from qvgen.quant.grid import Grid, Profile
    from qvgen_kernels import fake_quantize

    device = setting.device
    profile = Profile(
        name="paper",
        weight=Grid(bits=bits[0], granularity="per_channel", zero_point="integer"),
        activation=Grid(bits=bits[1], granularity="per_token", zero_point="integer"),
    )
    torch.manual_seed(0)
    linear = nn.Linear(layer.columns, layer.outputs).to(device)
    trained = FakeQuantLinear(linear, profile=profile, noise_band=NoiseBand(1), phi_rank=0).to(device)
    RoundToNearest().initialize_(trained, statistics=None)
    trained.noise_band.set_timestep(torch.zeros(1, device=device))
    x = torch.randn(1, layer.rows, layer.columns, device=device)
    gradient = torch.randn(1, layer.rows, layer.outputs, device=device, dtype=torch.bfloat16)

    def step(module: nn.Module, *, fused: bool) -> list[Tensor]:
        rows = x.detach().requires_grad_()
        module.zero_grad(set_to_none=True)
        with nullcontext() if fused else unfused(), torch.autocast(device.type, torch.bfloat16):
            y = module(rows)
            y.backward(gradient.to(y.dtype))
        return [y.detach(), *(value.grad for value in (rows, *module.parameters()) if value.grad is not None)]

    head: Row = {
        "model": model, "layer": layer.name, "bits": f"w{bits[0]}a{bits[1]}",
        "rows": layer.rows, "columns": layer.columns, "outputs": layer.outputs,
    }  # fmt: skip
    calls = {
        "nn.Linear": lambda: step(linear, fused=False),
        "eager": lambda: step(trained, fused=False),
    }
    if device.type in fake_quantize._reasons and (reason := fake_quantize._reasons[device.type]()) is None:
        calls["fused"] = lambda: step(trained, fused=True)
        pairs = zip(step(trained, fused=True), step(trained, fused=False), strict=True)
        head["bits_equal"] = all(torch.equal(a, b) for a, b in pairs)
    else:
        head["not there"] = reason if device.type in fake_quantize._reasons else f"no fused operators for {device.type}"
    timer = by_wall if setting.rehearse else by_events
    for name, found in compare(calls, timer=timer, rounds=1 if warm or setting.rehearse else None).items():
        yield head | {"candidate": name, **found}
