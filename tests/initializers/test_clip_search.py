"""Clips of sampled inputs: less error than the table's, the same for layers that share an input, none without clips."""

from __future__ import annotations

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn

import qvgen
from qvgen.initializers.base import LayerStatistics
from qvgen.initializers.clip_search import needs_with_inputs, start_clips_
from qvgen.layers.swap import quantized_layers, swap_fake_quant_
from qvgen.quant.width_table import WidthTable
from tests.profiles import make_profile

K = 1024


class Attention(nn.Module):
    """Three layers that read one input, and one that reads another."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(K, 32) for _ in range(4))

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        del timestep
        return self.to_q(x) + self.to_k(x) + self.to_v(x) + self.to_out(x.abs())


def prepared(profile: str = "paper", bits: int = 4) -> nn.Module:
    model = Attention()
    swap_fake_quant_(
        model, names=["to_q", "to_k", "to_v", "to_out"], profile=make_profile(profile, activation_bits=bits),
        num_noise_bands=3,
    )  # fmt: skip
    return model


def rows() -> Tensor:
    """A hundredth of the channels is ten times as loud: they stretch every row."""
    x = torch.randn(300, K, generator=torch.Generator().manual_seed(1))
    x[:, : K // 100] *= 10
    return x


def seen(name: str) -> LayerStatistics:
    inputs = rows()[:200]
    inputs = inputs.abs() if name == "to_out" else inputs
    return LayerStatistics(abs_max=inputs.abs().amax(0)[None], second_moment=None, inputs=inputs, num_rows=len(inputs))


def error(layer: nn.Module, x: Tensor) -> float:
    """|(Q(x) - x) W^T|^2 on rows that the search has not seen."""
    codes = layer.input_codes(x[:, None]).double()
    low, high = (table[0].detach().double() for table in layer.activation_quantizer.tables())
    least, most = (
        x.double().amin(1, keepdim=True).clamp(max=0) * low,
        x.double().amax(1, keepdim=True).clamp(min=0) * high,
    )
    scale = (most - least) / 7
    zero = (-least / scale).round().clamp(0, 7)
    lost = (codes - zero) * scale - x
    return float((lost @ layer.weight.detach().double().mT).square().sum())


def test_the_start_loses_less_than_the_tables() -> None:
    model = prepared(bits=3)
    layers = quantized_layers(model)
    held_out = rows()[200:]
    for layer in layers.values():
        layer.noise_band.set_timestep(torch.zeros(len(held_out)))
    before = {name: error(layers[name], held_out.abs() if name == "to_out" else held_out) for name in layers}
    start_clips_(layers, [("to_q", "to_k", "to_v")], statistics=seen)
    for name, layer in layers.items():
        assert error(layer, held_out.abs() if name == "to_out" else held_out) < 0.97 * before[name], name


def test_layers_that_share_an_input_get_the_same_clips_and_all_bands_are_alike() -> None:
    layers = quantized_layers(prepared())
    start_clips_(layers, [("to_q", "to_k", "to_v")], statistics=seen)
    tables = {name: torch.stack(layer.activation_quantizer.tables()) for name, layer in layers.items()}
    assert torch.equal(tables["to_q"], tables["to_k"])
    assert torch.equal(tables["to_q"], tables["to_v"])
    assert not torch.equal(tables["to_q"], tables["to_out"])
    for table in tables.values():
        assert torch.equal(table, table[:, :1].expand(2, 3))


def test_every_width_of_a_layer_is_searched() -> None:
    layers = quantized_layers(prepared())
    for layer in layers.values():
        layer.set_width_table_(WidthTable(bands=(), switch=(4, 8)))
    start_clips_(layers, (), statistics=seen)
    four, eight = (quantizer.tables()[1][0].item() for quantizer in layers["to_q"].activation_quantizers().values())
    assert four < 0.8 < eight


@pytest.mark.parametrize("profile", ["convrot", "int8", "svdq_g64", "w4a8_row"])
def test_a_profile_without_clips_asks_for_nothing(profile: str) -> None:
    layers = quantized_layers(prepared(profile))

    def never(name: str) -> LayerStatistics:
        raise AssertionError(name)

    start_clips_(layers, (), statistics=never)
    assert needs_with_inputs((), layers["to_q"].profile, is_searched=True) == frozenset()
    assert needs_with_inputs(["abs_max"], make_profile("paper"), is_searched=True) == {"abs_max", "inputs"}
    assert needs_with_inputs(["abs_max"], make_profile("paper"), is_searched=False) == {"abs_max"}


def test_the_python_interface_searches_where_it_may_run_the_model() -> None:
    sizes = {"num_attention_heads": 2, "attention_head_dim": 16, "ffn_dim": 64, "text_dim": 32, "num_layers": 1}
    torch.manual_seed(0)
    models = [WanTransformer3DModel(**sizes) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())

    def calibrate(model: nn.Module) -> None:
        generator = torch.Generator().manual_seed(2)
        model(
            hidden_states=torch.randn(1, 16, 1, 8, 8, generator=generator),
            timestep=torch.tensor([500]),
            encoder_hidden_states=torch.randn(1, 4, 32, generator=generator),
        )

    qvgen.prepare(models[0], bits="w4a3", init="mse")
    qvgen.prepare(models[1], bits="w4a3", init="mse", calibrate=calibrate)
    table, searched = (
        {name: layer.activation_quantizer.tables()[1][0].item() for name, layer in quantized_layers(model).items()}
        for model in models
    )
    assert table["blocks.0.attn1.to_q"] == pytest.approx(0.86)
    assert sum(abs(table[name] - searched[name]) > 1e-3 for name in table) > len(table) / 2
