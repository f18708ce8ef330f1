"""Layers with static activations: the scale of a sampling step, interpolation between steps, gradients, packing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from qvgen.layers.fake_quant_linear import FakeQuantLinear
from qvgen.layers.noise_band import NoiseBand, watch_timestep
from qvgen.layers.packed_linear import PackedLinear
from qvgen.layers.swap import forms, not_sampling, restore_forms_
from qvgen.quant.affine import choose_qparams
from tests.profiles import COLUMNS, make_profile

ROWS = 10
STEPS = (250.0, 500.0, 937.5)
SCALES, ZEROS = torch.tensor([0.1, 0.2, 0.4]), torch.tensor([7.0, 8.6, 3.0])


def make_dynamic_layer(*, zero_point: str = "integer", bits: int = 4) -> FakeQuantLinear:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        linear = nn.Linear(COLUMNS, ROWS)
    profile = make_profile("paper", weight_bits=bits, activation_bits=bits)
    activation = replace(profile.activation, zero_point=zero_point)
    layer = FakeQuantLinear(linear, profile=replace(profile, activation=activation), noise_band=NoiseBand(50))
    layer.weight_quantizer.start_from_(*choose_qparams(layer.weight.detach(), grid=profile.weight))
    return layer


def make_layer(*, zero_point: str = "integer") -> FakeQuantLinear:
    layer = make_dynamic_layer(zero_point=zero_point)
    layer.set_static_(timesteps=STEPS, scale=SCALES, zero_point=ZEROS)
    return layer


def make_input(samples: int) -> torch.Tensor:
    return torch.randn(samples, 5, COLUMNS, generator=torch.Generator().manual_seed(1))


def oracle(layer: FakeQuantLinear, x: torch.Tensor, scales: list[float], zeros: list[float]) -> torch.Tensor:
    """float64, sample by sample."""
    weight = layer.quantized_weight().double()
    parts = []
    for sample, scale, zero in zip(x, scales, zeros, strict=True):
        low, high = (0, 15) if layer.profile.activation.zero_point == "integer" else (-7, 7)
        codes = ((sample * (1.0 / torch.tensor(scale))).round() + zero).clamp(low, high).double()
        parts.append(scale * (codes - zero) @ weight.mT + layer.bias.double())
    return torch.stack(parts)


@pytest.mark.parametrize("kind", ["integer", "none"])
def test_every_sample_takes_the_scale_of_its_step(kind: str) -> None:
    layer, x = make_layer(zero_point=kind), make_input(3)
    layer.noise_band.set_timestep(torch.tensor([937.5, 250.0, 500.0]))
    zeros = [3.0, 7.0, 9.0] if kind == "integer" else [0.0] * 3
    wanted = oracle(layer, x, [0.4, 0.1, 0.2], zeros)
    packed = PackedLinear.from_fake_quant(layer)
    with torch.no_grad():
        found = layer(x)
        assert torch.allclose(found.double(), wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))
        assert torch.equal(packed(x), found)
        assert torch.equal(packed.input_codes(x), layer.input_codes(x))


def test_between_two_steps_tables_are_interpolated_and_outside_of_them_the_end_holds() -> None:
    layer, x = make_layer(), make_input(4)
    layer.noise_band.set_timestep(torch.tensor([375.0, 718.75, 10.0, 999.0]))
    wanted = oracle(layer, x, [0.15, 0.3, 0.1, 0.4], [8.0, 6.0, 7.0, 3.0])
    with torch.no_grad():
        found = layer(x)
        assert torch.allclose(found.double(), wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))
        assert torch.equal(PackedLinear.from_fake_quant(layer)(x), found)


def test_nothing_depends_on_the_row() -> None:
    """A huge value in one token moves no other token's codes, nor its own others."""
    layer, x = make_layer(), make_input(1)
    layer.noise_band.set_timestep(torch.tensor([500.0]))
    changed = x.clone()
    changed[0, 2, 7] = 1e6
    before, after = layer.input_codes(x), layer.input_codes(changed)
    before[2, 7] = after[2, 7]
    assert torch.equal(before, after)


def test_gradients_of_scale_and_zero_point_are_lsqs() -> None:
    """Against the straight-through formulas in float64, for the step that was used; the others have none."""
    layer, x = make_layer(), make_input(1).requires_grad_()
    layer.noise_band.set_timestep(torch.tensor([500.0]))
    weights = torch.randn(1, 5, ROWS, generator=torch.Generator().manual_seed(2))
    (layer(x) * weights).sum().backward()
    grad = (weights.double() @ layer.quantized_weight().double())[0]  # of the quantized input
    scaled, zero = x.detach()[0].double() * float(1.0 / torch.tensor(0.2)), 9.0
    unclamped = scaled.round() + zero
    codes, inside = unclamped.clamp(0, 15), (unclamped >= 0) & (unclamped <= 15)
    factor = 1 / (COLUMNS * 15) ** 0.5
    grad_scale = (grad * (codes - zero) - grad * inside * scaled).sum() * factor
    grad_zero = (-0.2 * grad * ~inside).sum() * factor
    quantizer = layer.activation_quantizer
    assert quantizer.scale.grad.tolist() == pytest.approx([0, float(grad_scale), 0], rel=1e-4)
    assert quantizer.zero_point.grad.tolist() == pytest.approx([0, float(grad_zero), 0], rel=1e-4)
    assert torch.allclose(x.grad[0].double(), grad * inside, rtol=1e-4, atol=1e-5)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = make_layer()
        watch_timestep(self, self.layer.noise_band)

    def forward(self, x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def test_strict_tables_refuse_other_steps_only_where_the_model_samples() -> None:
    model, x = Model().eval(), make_input(1)
    model.layer.noise_band.strict = True
    with torch.no_grad():
        model(x, torch.tensor([500.001]))
        with pytest.raises(ValueError, match=r"timestep \[400\.0\] is not among the 3"):
            model(x, torch.tensor([400.0]))
        with not_sampling(model):
            model(x, torch.tensor([400.0]))
        model.train()
        model(x, torch.tensor([400.0]))
        with pytest.raises(ValueError, match="not among"):
            model.eval()(x, torch.tensor([400.0]))


def test_all_layers_share_one_list_of_steps() -> None:
    layer = make_layer()
    with pytest.raises(ValueError, match="tables of the steps .* are there"):
        layer.set_static_(timesteps=(1.0, 2.0), scale=torch.ones(2), zero_point=torch.ones(2))
    for bad in ((), (3.0, 2.0), (1.0, 1.0), (-1.0, 5.0), (5.0, 1001.0)):
        with pytest.raises(ValueError, match=r"must rise within 0\.\.1000"):
            NoiseBand(3).use_timesteps_(bad)


def test_the_form_comes_back_with_steps_and_strictness() -> None:
    model, other = nn.ModuleDict({"a": make_layer()}), nn.ModuleDict({"a": make_dynamic_layer()})
    model["a"].noise_band.strict = True
    restore_forms_(other, forms(model))
    other.load_state_dict(model.state_dict())
    band = other["a"].noise_band
    assert (band.timesteps, band.strict) == (STEPS, True)
    x = make_input(1)
    for layer in (model["a"], other["a"]):
        layer.noise_band.set_timestep(torch.tensor([500.0]))
    assert torch.equal(other["a"](x), model["a"](x))
