"""Layers, statistics and inputs that every PTQ method of conf/init is tried on, as a contract and for its quality."""

from __future__ import annotations

from functools import cache

import torch
from torch import nn

from qvgen.config.leaves import leaf_names, load_leaf
from qvgen.initializers.base import LayerStatistics, StepRanges
from qvgen.initializers.calibration import Calibration
from qvgen.initializers.prepare import PrepareConfig, prepare
from qvgen.layers.fake_quant_linear import FakeQuantLinear
from qvgen.layers.noise_band import NoiseBand
from tests.layers.model import make_inputs, make_model
from tests.profiles import COLUMNS, PROFILES, make_profile

INITIALIZERS = leaf_names("init")
ROWS = 12
REFUSED = {("static", "convrot"): "init=static has no rotation"}
"""Pairs of a method and a profile that can't be, and what is said about them."""

PAIRS = [(name, profile) for name in INITIALIZERS for profile in PROFILES if (name, profile) not in REFUSED]


def make_weight(seed=0):
    """Gaussian rows with some heavy tails, as trained weights have."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(ROWS, COLUMNS, generator=generator) * torch.logspace(-2, 0, ROWS)[:, None]
    return weight * (1 + 4 * (torch.rand(ROWS, COLUMNS, generator=generator) > 0.98))


def make_statistics(columns=COLUMNS, seed=1):
    """Of inputs with four loud channels, a dead one, and correlated neighbours."""
    x = torch.randn(512, columns, generator=torch.Generator().manual_seed(seed))
    x = x + 0.5 * x.roll(1, 1)
    x[:, :4] *= 20
    x[:, 7] = 0
    return statistics_of(x, inputs=x[:64])


def statistics_of(x, *, inputs):
    return LayerStatistics(
        abs_max=x.abs().amax(0).expand(3, -1).clone(),
        second_moment=x.mT @ x / len(x),
        inputs=inputs,
        num_rows=len(x),
        ranges=StepRanges(
            timesteps=(250.0, 500.0, 750.0), low=x.amin(0).expand(3, -1).clone(), high=x.amax(0).expand(3, -1).clone()
        ),
    )


def initialize_(name, layer):
    initializer = load_leaf("init", name)
    statistics = make_statistics(layer.in_features) if initializer.needs else None
    return initializer.initialize_(layer, statistics=statistics)


def made_layer(profile, weight):
    linear = nn.Linear(COLUMNS, ROWS)
    with torch.no_grad():
        linear.weight.copy_(weight)
        linear.bias.copy_(weight[:, 0])
    return FakeQuantLinear(linear, profile=profile, noise_band=NoiseBand(3))


def initialized(name, profile, weight):
    layer = made_layer(profile, weight)
    initialize_(name, layer)
    return layer


def relative_error(layer):
    """Of the weight as the grid has it, |Q(W) - W|^2 / |W|^2 by row."""
    weight = layer.weight.detach().double()
    return ((layer.quantized_weight().double() - weight).square().sum(1) / weight.square().sum(1)).tolist()


def output_error(layer, x):
    """|y - y_exact|^2 / |y_exact|^2 of a layer."""
    layer.noise_band.set_timestep(torch.tensor(500))
    with torch.no_grad():
        exact = x @ make_weight().mT + make_weight()[:, 0]
        return ((layer(x) - exact).norm() / exact.norm()).square().item()


@cache
def _statistics_of_the_model(needs):
    """What a pass of the full-precision model tells calibration."""
    model = make_model(num_blocks=1)
    names = [key for key, module in model.named_modules() if isinstance(module, nn.Linear)]
    watch = Calibration(model, names=names, needs=needs, num_bands=50, seed=0)
    with torch.no_grad(), watch:
        model(*make_inputs())
    return watch.statistics


def prepared(name, profile_name, *, bits, phi_rank):
    """A small model whose four layers a method has set up, with 8-bit activations."""
    model, initializer = make_model(num_blocks=1), load_leaf("init", name)
    profile = make_profile(profile_name, weight_bits=bits, activation_bits=8)
    statistics = _statistics_of_the_model(initializer.needs)
    prepare(model, PrepareConfig(profile=profile, initializer=initializer, phi_rank=phi_rank, statistics=statistics))
    return model
