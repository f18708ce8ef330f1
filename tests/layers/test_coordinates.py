"""A layer in other coordinates (smoothed, rotated) and with other bits: what it computes, its gradients, its packed form."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from qvgen.initializers.rtn import RoundToNearest
from qvgen.layers.fake_quant_linear import FakeQuantLinear
from qvgen.layers.noise_band import NoiseBand
from qvgen.layers.packed_linear import PackedLinear
from qvgen.layers.swap import forms, quantized_layers, restore_forms_
from tests.hadamard_oracle import hadamard_matrix
from tests.layers.model import make_inputs, prepared_model
from tests.profiles import make_profile

COLUMNS, ROWS = 120, 12


def make_layer(bits: int = 8) -> tuple[FakeQuantLinear, nn.Linear]:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        linear = nn.Linear(COLUMNS, ROWS)
    profile = make_profile("paper", weight_bits=bits, activation_bits=bits)
    layer = FakeQuantLinear(linear, profile=profile, noise_band=NoiseBand(4))
    layer.noise_band.set_timestep(torch.tensor([300.0]))
    return layer, linear


def factor() -> torch.Tensor:
    signs = torch.randint(0, 2, (COLUMNS,), generator=torch.Generator().manual_seed(0)) * 2 - 1
    return signs * torch.logspace(-0.3, 0.3, COLUMNS)


@pytest.mark.parametrize("rotation", [0, 8, 120])
def test_the_weight_moves_as_the_oracle_says_and_comes_back(rotation: int) -> None:
    layer, linear = make_layer()
    layer.move_(profile=replace(layer.profile, rotation=rotation), input_scale=factor())
    expected = linear.weight.detach().double() / factor().double()
    if rotation:
        blocks = torch.block_diag(*[torch.as_tensor(hadamard_matrix(rotation)).double()] * (COLUMNS // rotation))
        expected = expected @ blocks
    assert torch.allclose(layer.weight.double(), expected, rtol=0, atol=1e-6 * float(expected.abs().max()))
    assert torch.allclose(layer.original_weight(), linear.weight, rtol=0, atol=1e-6)
    layer.move_(profile=replace(layer.profile, rotation=0))
    assert layer.input_scale is None
    assert torch.allclose(layer.weight, linear.weight, rtol=0, atol=1e-6)


@pytest.mark.parametrize("rotation", [0, 120])
def test_at_eight_bits_the_output_stays_and_gradients_reach_the_input(rotation: int) -> None:
    layer, linear = make_layer()
    layer.move_(profile=replace(layer.profile, rotation=rotation), input_scale=factor())
    RoundToNearest().initialize_(layer, statistics=None)
    for clip in (layer.activation_quantizer.clip_low, layer.activation_quantizer.clip_high):
        clip.data.fill_(20.0)  # nothing is clipped
    x = torch.randn(1, 9, COLUMNS, generator=torch.Generator().manual_seed(1), requires_grad=True)
    exact = linear(x)
    found = layer(x)
    assert (found - exact).norm() < 0.03 * exact.norm()
    weights = torch.randn(exact.shape, generator=torch.Generator().manual_seed(2))
    (wanted,) = torch.autograd.grad((exact * weights).sum(), x)
    (got,) = torch.autograd.grad((found * weights).sum(), x)
    assert (got - wanted).norm() < 0.05 * wanted.norm()


@pytest.mark.parametrize("rotation", [0, 120])
@pytest.mark.parametrize("bits", [3, 8])
def test_packed_equals_fake_quantized_bitwise(rotation: int, bits: int) -> None:
    layer, _ = make_layer(bits=5)
    profile = replace(
        layer.profile,
        rotation=rotation,
        weight=replace(layer.profile.weight, bits=bits),
        activation=replace(layer.profile.activation, bits=bits),
    )
    layer.move_(profile=profile, input_scale=factor())
    RoundToNearest().initialize_(layer, statistics=None)
    packed = PackedLinear.from_fake_quant(layer)
    assert torch.equal(packed.input_scale, factor())
    x = torch.randn(1, 9, COLUMNS, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(packed(x), layer(x))
        assert torch.equal(packed.input_codes(x), layer.input_codes(x))
    assert int(packed.integer_codes().max()) <= 2**bits - 1


def test_forms_are_stored_and_restored() -> None:
    model, other = (prepared_model(make_profile("paper"), phi_rank=0) for _ in range(2))
    layers = quantized_layers(model)
    for index, layer in enumerate(layers.values()):
        profile = replace(layer.profile, rotation=64 * (index % 2))
        layer.move_(profile=profile, input_scale=torch.linspace(1, 2, layer.in_features) if index % 3 else None)
    with pytest.raises(RuntimeError, match="input_scale"):
        other.load_state_dict(model.state_dict())
    restore_forms_(other, forms(model))
    other.load_state_dict(model.state_dict())
    inputs = make_inputs()
    with torch.no_grad():
        assert torch.equal(other(*inputs), model(*inputs))
    stored = forms(model)
    stored["layers"].pop("output")
    with pytest.raises(ValueError, match="6 stored layers are not the 7 of the model"):
        restore_forms_(other, stored)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_scale": torch.ones(COLUMNS - 1)}, "input_scale must be 120 finite values"),
        ({"input_scale": torch.zeros(COLUMNS)}, "other than 0"),
        ({"input_scale": torch.full((COLUMNS,), float("nan"))}, "finite"),
        ({"rotation": 16}, "rotation=16 does not divide"),
        ({"kind": "none"}, "differs in more than bits"),
    ],
)
def test_what_does_not_fit_is_refused_and_changes_nothing(change: dict, message: str) -> None:
    layer, _ = make_layer()
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    profile = layer.profile
    if "kind" in change:
        profile = replace(profile, weight=replace(profile.weight, zero_point=change["kind"]))
    profile_before, changed = layer.profile, replace(profile, rotation=change.get("rotation", 0))
    with pytest.raises(ValueError, match=message):
        layer.move_(profile=changed, input_scale=change.get("input_scale"))
    assert layer.profile == profile_before
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())
