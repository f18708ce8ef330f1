"""SVDQuant against the paper's split in float64, and its branch through training's layer and the packed one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from qvgen.initializers.base import LayerStatistics
from qvgen.initializers.smoothquant import SmoothQuant
from qvgen.initializers.svdquant import SvdQuant
from qvgen.layers.fake_quant_linear import FakeQuantLinear
from qvgen.layers.noise_band import NoiseBand
from qvgen.layers.packed_linear import PackedLinear
from tests.hadamard_oracle import hadamard_matrix
from tests.profiles import make_profile

ROWS, COLUMNS, RANK = 40, 64, 4
METHOD = SvdQuant(alpha=0.5, rank=RANK, seed=0, fold_smoothing=False)


def make_weight() -> torch.Tensor:
    """A few strong directions on noise, as attention weights have them."""
    generator = torch.Generator().manual_seed(0)
    strong = torch.randn(ROWS, RANK, generator=generator) @ torch.randn(RANK, COLUMNS, generator=generator)
    return strong + 0.3 * torch.randn(ROWS, COLUMNS, generator=generator)


def make_inputs() -> torch.Tensor:
    x = torch.randn(96, COLUMNS, generator=torch.Generator().manual_seed(1))
    x[:, 3] *= 30
    return x


def make_layer(method: SvdQuant | SmoothQuant, *, rotation: int = 0, bits: int = 4) -> FakeQuantLinear:
    linear = nn.Linear(COLUMNS, ROWS)
    with torch.no_grad():
        linear.weight.copy_(make_weight())
        linear.bias.copy_(make_weight()[:, 0])
    profile = replace(make_profile("paper", weight_bits=bits, activation_bits=bits), rotation=rotation)
    layer = FakeQuantLinear(linear, profile=profile, noise_band=NoiseBand(3))
    x = make_inputs()
    statistics = LayerStatistics(abs_max=x.abs().amax(0).expand(3, -1), second_moment=None, inputs=x, num_rows=len(x))
    method.initialize_(layer, statistics=statistics)
    layer.noise_band.set_timestep(torch.tensor(500))
    return layer


@pytest.mark.parametrize("rotation", [0, 64])
def test_the_split_is_the_papers(rotation: int) -> None:
    """Rank 4 of the smoothed weight in the branch, the rest in the master weight: the sum is the weight itself."""
    layer = make_layer(METHOD, rotation=rotation)
    weight, x = make_weight().double().numpy(), make_inputs().double().numpy()
    m = layer.input_scale.double().numpy()
    unscaled = np.sqrt(np.abs(weight).max(0) / np.abs(x).max(0))
    assert np.allclose(m, unscaled / np.sort(unscaled)[(COLUMNS - 1) // 2], rtol=1e-5)
    smoothed = weight / m
    singular = np.linalg.svd(smoothed, compute_uv=False)
    branch = layer.branch_up.double().numpy() @ layer.branch_down.double().numpy()  # on x: times m
    matrix = np.asarray(hadamard_matrix(rotation)) if rotation else np.eye(COLUMNS)
    residual = layer.weight.detach().double().numpy() @ matrix.T * m
    assert np.abs(branch + residual - weight).max() < 1e-5 * np.abs(weight).max()
    left = np.square(layer.weight.detach().double().numpy()).sum()
    optimal = np.square(singular[RANK:]).sum()
    assert optimal * (1 - 1e-6) <= left <= optimal * 1.01 + 1e-4 * np.square(singular).sum()  # bfloat16 factors
    assert layer.branch_down.shape == (RANK, COLUMNS)
    assert layer.branch_down.dtype == torch.bfloat16


def test_the_branch_lowers_the_error_of_smoothing_alone() -> None:
    x = make_inputs()
    exact = x @ make_weight().mT + make_weight()[:, 0]
    with torch.no_grad():
        with_branch, without = (
            ((make_layer(method)(x) - exact).norm() / exact.norm()).item()
            for method in (
                METHOD,
                SmoothQuant(alpha=0.5, fold_smoothing=False),
            )
        )
    assert with_branch < 0.6 * without


@pytest.mark.parametrize("rotation", [0, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_equals_fake_quantized(rotation: int, dtype: torch.dtype) -> None:
    layer = make_layer(METHOD, rotation=rotation)
    packed, x = PackedLinear.from_fake_quant(layer), make_inputs().to(dtype)
    assert packed.form.branch_rank == RANK
    with torch.no_grad():
        found, wanted = packed(x), layer(x)
    if dtype == torch.float32:
        assert torch.equal(found, wanted)
    else:  # the fake product runs in bfloat16 here, the integers in float32
        assert (found.float() - wanted.float()).norm() < 0.01 * wanted.float().norm()


def test_gradients_go_through_the_branch() -> None:
    """At 8 bits the layer's gradient is the Linear's, which it is only with the branch's part."""
    layer = make_layer(METHOD, bits=8)
    x = make_inputs().requires_grad_()
    weights = torch.randn(96, ROWS, generator=torch.Generator().manual_seed(2))
    (found,) = torch.autograd.grad((layer(x) * weights).sum(), x)
    exact = weights @ make_weight()
    assert (found - exact).norm() < 0.05 * exact.norm()


def test_a_small_weight_has_a_branch_of_its_own_rank() -> None:
    layer = make_layer(SvdQuant(alpha=0.5, rank=100, seed=0, fold_smoothing=False))
    assert layer.branch_down.shape == (ROWS, COLUMNS)
    assert layer.weight.abs().max() < 0.02 * make_weight().abs().max()


@pytest.mark.parametrize(
    ("options", "message"),
    [({"rank": 0}, "init.rank=0 must be greater than 0"), ({"alpha": 1.5}, r"init.alpha=1.5 is outside \[0, 1\]")],
)
def test_bad_options_are_named(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SvdQuant(**({"alpha": 0.5, "rank": 32, "seed": 0, "fold_smoothing": False} | options))  # type: ignore[arg-type]
