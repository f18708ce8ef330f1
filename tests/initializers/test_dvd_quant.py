"""DVD-Quant's random signs: what they are for, and what they may not change."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from qvgen.config.leaves import load_leaf
from qvgen.initializers.dvd_quant import DvdQuant
from qvgen.layers.fake_quant_linear import FakeQuantLinear
from qvgen.layers.noise_band import NoiseBand
from qvgen.quant.hadamard import random_signs
from tests.profiles import make_profile

COLUMNS, ROWS = 480, 16


def quantized(initializer: DvdQuant, linear: nn.Linear) -> FakeQuantLinear:
    profile = make_profile("paper", weight_bits=8, activation_bits=4)
    layer = FakeQuantLinear(linear, profile=profile, noise_band=NoiseBand(1))
    layer.noise_band.set_timestep(torch.tensor(500))
    initializer.initialize_(layer, statistics=None)
    return layer


def relative_error(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).square().sum() / exact.square().sum())


def test_inputs_with_a_mean_need_the_signs() -> None:
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(COLUMNS, ROWS, bias=False)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(ROWS, COLUMNS, generator=generator) / COLUMNS**0.5)
        x = nn.functional.gelu(2 * torch.randn(64, COLUMNS, generator=generator))
        initializer = load_leaf("init", "dvd_quant")
        exact = linear(x)
        errors = [
            relative_error(quantized(kind, linear)(x), exact)
            for kind in (initializer, replace(initializer, signs=False))
        ]
    assert errors[0] < 0.2 * errors[1]


def test_signs_are_balanced_and_repeat() -> None:
    signs = random_signs(1920, key="a")
    assert torch.equal(signs.abs(), torch.ones(1920))
    assert abs(float(signs.sum())) < 4 * 1920**0.5
    assert torch.equal(signs, random_signs(1920, key="a"))
    assert not torch.equal(signs, random_signs(1920, key="b"))


def test_signs_without_a_rotation_are_refused() -> None:
    with pytest.raises(ValueError, match="does nothing"):
        replace(load_leaf("init", "dvd_quant"), rotate=False)
    assert not replace(load_leaf("init", "dvd_quant"), rotate=False, signs=False).rotate
