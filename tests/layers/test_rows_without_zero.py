"""Layers whose weight has rows that do not contain 0, with a real zero point: better grids, the same codes when packed."""

import pytest
import torch
from torch import nn

from qvgen.initializers.mse import MeanSquaredError
from qvgen.initializers.rtn import RoundToNearest
from qvgen.layers.fake_quant_linear import FakeQuantLinear
from qvgen.layers.noise_band import NoiseBand
from qvgen.layers.packed_linear import PackedLinear
from qvgen.quant.grid import Grid, Profile

OFFSETS = (0.0, 0.5, -0.5, 0.02)


def make(kind, group=None, *, bits=3):
    torch.manual_seed(0)
    linear = nn.Linear(64, 32)
    with torch.no_grad():
        linear.weight.add_(torch.tensor(OFFSETS).repeat(8)[:, None])
    weight = Grid(bits=bits, granularity="per_group" if group else "per_channel", group_size=group, zero_point=kind)
    profile = Profile(name="own", weight=weight, activation=Grid(bits=8, granularity="per_token"))
    layer = FakeQuantLinear(linear, profile=profile, noise_band=NoiseBand(1))
    layer.noise_band.set_timestep(torch.tensor([0.0]))
    return linear, layer


@pytest.mark.parametrize("method", [RoundToNearest(), MeanSquaredError()], ids=["rtn", "mse"])
@pytest.mark.parametrize("group", [None, 16])
def test_their_error_falls_and_that_of_other_rows_stays(method, group):
    errors = {}
    for kind in ("real", "integer"):
        linear, layer = make(kind, group)
        method.initialize_(layer, statistics=None)
        lost = (layer.quantized_weight() - linear.weight).square().sum(1).detach()
        errors[kind] = lost.reshape(8, 4).sum(0)
    assert (errors["real"][1:3] < 0.2 * errors["integer"][1:3]).all()  # a range of .25 in place of .625
    assert (errors["real"][[0, 3]] < 1.1 * errors["integer"][[0, 3]]).all()


@pytest.mark.parametrize("group", [None, 16])
def test_they_are_folded_to_the_trained_codes_and_run_packed(group):
    linear, layer = make("real", group)
    RoundToNearest().initialize_(layer, statistics=None)
    packed = PackedLinear.from_fake_quant(layer, kernel="reference")
    assert torch.equal(packed.integer_codes(), layer.weight_quantizer.codes(layer.weight))
    zero = packed.state_dict()["weight_zero_point"]
    assert (zero < 0).any()
    assert (zero > layer.profile.weight.qmax).any()
    x = torch.randn(1, 9, 64)
    found, expected = packed(x), layer(x)
    # Raw codes times z: both sides sum numbers of the offset's size in float32, in orders of their own.
    bound = 64 * 2.0**-22 * (x.abs().max() * linear.weight.abs().max() * 64)
    assert (found - expected).abs().max() <= bound
    assert (expected - linear(x)).norm() < 0.05 * linear(x).norm()
