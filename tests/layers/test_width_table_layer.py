"""Layers whose widths change over sampling: each sample gets what a layer of its own widths gives, bit for bit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from qvgen.layers.fake_quant_linear import FakeQuantLinear
from qvgen.layers.layer_form import LayerForm
from qvgen.layers.noise_band import NoiseBand
from qvgen.layers.packed_linear import PackedLinear
from qvgen.layers.swap import forms, quantized_layers, restore_forms_
from qvgen.quant.affine import choose_qparams
from qvgen.quant.width_table import WidthTable
from tests.layers.model import make_inputs, prepared_model
from tests.profiles import COLUMNS, make_profile

ROWS, BANDS = 10, 4
BANDS_PLAN = WidthTable(bands=((8, 8), (4, 6), (4, 4), (3, 4)))
TIMESTEPS = torch.tensor([100.0, 900.0, 400.0])


def make_layer(width_table: WidthTable | None, *, bits: tuple[int, int] = (4, 4)) -> FakeQuantLinear:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        linear = nn.Linear(COLUMNS, ROWS)
    profile = make_profile("paper", weight_bits=bits[0], activation_bits=bits[1])
    layer = FakeQuantLinear(linear, profile=profile, noise_band=NoiseBand(BANDS))
    layer.set_width_table_(width_table)
    for quantizer in layer.weight_quantizers().values():
        quantizer.start_from_(*choose_qparams(layer.weight.detach(), grid=quantizer.grid))
    layer.noise_band.set_timestep(TIMESTEPS)
    return layer


def make_input(samples: int = 3) -> torch.Tensor:
    return torch.randn(samples, 5, COLUMNS, generator=torch.Generator().manual_seed(1))


def expected_of(widths: list[tuple[int, int]], x: torch.Tensor) -> torch.Tensor:
    """Every sample through a plain layer of its own widths."""
    parts = []
    for sample, (timestep, pair) in enumerate(zip(TIMESTEPS, widths, strict=True)):
        layer = make_layer(None, bits=pair)
        layer.noise_band.set_timestep(timestep)
        parts.append(layer(x[sample : sample + 1]))
    return torch.cat(parts)


@pytest.mark.parametrize("per_sample", [1, 2])
def test_every_sample_has_the_widths_of_its_band(per_sample: int) -> None:
    layer, x = make_layer(BANDS_PLAN), make_input()
    packed = PackedLinear.from_fake_quant(layer)
    with torch.no_grad():
        wanted = expected_of([(8, 8), (3, 4), (4, 6)], x)
        rows = x.reshape(3 * per_sample, -1, COLUMNS) if per_sample == 1 else x[:, :4].reshape(6, 2, COLUMNS)
        wanted = wanted if per_sample == 1 else wanted[:, :4].reshape(6, 2, ROWS)
        assert torch.equal(layer(rows), wanted)
        assert torch.equal(packed(rows), wanted)


def test_a_policy_changes_the_activations_of_all_samples() -> None:
    layer, x = make_layer(WidthTable(switch=(4, 8))), make_input()
    packed = PackedLinear.from_fake_quant(layer)
    with torch.no_grad():
        for bits, widths in ((None, (4, 4)), (8, (4, 8)), (4, (4, 4)), (6, (4, 4))):  # 6 is none of the switch's
            layer.noise_band.policy_bits = None if bits is None else (bits,) * 3
            wanted = expected_of([widths] * 3, x)
            assert torch.equal(layer(x), wanted)
            assert torch.equal(packed(x), wanted)


def test_a_policy_may_ask_for_other_widths_of_each_sample() -> None:
    layer, x = make_layer(WidthTable(switch=(4, 8))), make_input()
    layer.noise_band.policy_bits = (8, 4, 8)
    with torch.no_grad():
        wanted = expected_of([(4, 8), (4, 4), (4, 8)], x)
        assert torch.equal(layer(x), wanted)
        assert torch.equal(PackedLinear.from_fake_quant(layer)(x), wanted)


def test_widths_of_activations_share_the_prepacked_weight() -> None:
    layer = make_layer(WidthTable(switch=(4, 8)))
    packed = PackedLinear.from_fake_quant(layer, kernel="reference")
    assert packed.prepack_((4, 4)) == packed.prepack_((4, 8)) == "reference"
    first, second = (weight for _, _, weight in packed._prepacked.values())
    assert all(a is b for a, b in zip(first, second, strict=True))


def test_a_policy_is_for_layers_with_a_switch_alone() -> None:
    layer, x = make_layer(None), make_input()
    with torch.no_grad():
        before = layer(x)
        layer.noise_band.policy_bits = (8, 8, 8)
        assert torch.equal(layer(x), before)


def test_gradients_are_those_of_the_samples_one_by_one() -> None:
    layer, x = make_layer(BANDS_PLAN), make_input().requires_grad_()
    layer(x).square().sum().backward()
    whole = {name: value.grad.clone() for name, value in layer.named_parameters() if value.grad is not None}
    grad_x = x.grad.clone()
    layer.zero_grad()
    x.grad = None
    for sample, timestep in enumerate(TIMESTEPS):
        layer.noise_band.set_timestep(timestep)
        layer(x[sample : sample + 1]).square().sum().backward()
    assert torch.equal(x.grad, grad_x)
    for name, value in layer.named_parameters():
        if name in whole:
            assert torch.allclose(whole[name], value.grad, rtol=1e-5, atol=1e-6 * float(value.grad.abs().max())), name
    used = {
        "other_weight_quantizers.8.scale",
        "other_weight_quantizers.3.scale",
        "other_activation_quantizers.8.clip_low",
    }
    assert used <= set(whole)


def test_every_quantizer_has_a_gradient_whatever_widths_were_met() -> None:
    """On every process of a data-parallel run: zeros where no sample was in a band of that width."""
    layer, x = make_layer(BANDS_PLAN), make_input(1)
    layer.noise_band.set_timestep(torch.tensor([400.0]))  # w4a6 alone
    layer(x).square().sum().backward()
    for bits, quantizer in layer.weight_quantizers().items():
        assert quantizer.scale.grad is not None
        assert bool(quantizer.scale.grad.any()) == (bits == 4)
    for bits, quantizer in layer.activation_quantizers().items():
        assert quantizer.clip_high.grad is not None
        assert bool(quantizer.clip_high.grad.any()) == (bits == 6)


def test_a_checkpoint_holds_one_set_of_codes_per_weight_width() -> None:
    state = PackedLinear.from_fake_quant(make_layer(BANDS_PLAN)).state_dict()
    assert state["codes"].shape == (ROWS, COLUMNS // 2)
    assert state["other_weights.8.codes"].shape == (ROWS, COLUMNS)
    assert state["other_weights.3.codes_high"].shape == (ROWS, COLUMNS // 8)
    assert {"clip_low", "clip_low_6", "clip_high_8"} <= set(state)
    switched = PackedLinear.from_fake_quant(make_layer(WidthTable(switch=(4, 8)))).state_dict()
    assert not any(name.startswith("other_weights") for name in switched)
    assert {"clip_low", "clip_low_8"} <= set(switched)


def test_the_width_table_comes_back_with_the_layers_form() -> None:
    model, other = (prepared_model(make_profile("paper"), phi_rank=0) for _ in range(2))
    for layer in quantized_layers(model).values():
        layer.set_width_table_(WidthTable(bands=((8, 8), *([(3, 3)] * (layer.noise_band.num_bands - 1)))))
        layer.set_branch_(torch.ones(2, layer.in_features), torch.ones(layer.out_features, 2))
    restore_forms_(other, forms(model))
    other.load_state_dict(model.state_dict())
    inputs = make_inputs()
    with torch.no_grad():
        assert torch.equal(other(*inputs), model(*inputs))
    assert forms(other) == forms(model)


@pytest.mark.parametrize(
    ("width_table", "message"),
    [
        (lambda: WidthTable(), "says nothing"),
        (lambda: WidthTable(bands=((9, 4),) * BANDS), "width of 9 bits"),
        (lambda: WidthTable(bands=((4,),) * BANDS), "two widths"),  # type: ignore[arg-type]
        (lambda: WidthTable(switch=(8, 4)), "two or more rising widths"),
        (lambda: WidthTable(switch=(4,)), "two or more rising widths"),
        (lambda: WidthTable(bands=((4, 4),) * 3), "3 bands and the model 4"),
    ],
)
def test_width_tables_that_cannot_be_are_refused(width_table, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_layer(width_table())


def test_static_tables_have_one_width() -> None:
    profile = make_profile("paper")
    profile = replace(profile, activation=replace(profile.activation, granularity="per_tensor"))
    with pytest.raises(ValueError, match="static activations have one table"):
        WidthTable(switch=(4, 8)).check_fits(profile, num_bands=BANDS)
    assert LayerForm(profile=profile).static
