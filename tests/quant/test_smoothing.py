"""Smoothing factors against SmoothQuant's Eq. 4 in float64; the search against its own error by plain products."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qvgen.quant.affine import choose_qparams, fake_quantize
from qvgen.quant.grid import Grid
from qvgen.quant.hadamard import hadamard_transform
from qvgen.quant.smoothing import ALPHAS, MAX_FACTOR, output_error, search_alpha, smoothing_scale
from tests import oracles_ptq

WEIGHT_GRID = Grid(bits=4, granularity="per_channel")
INPUT_GRID = Grid(bits=4, granularity="per_token")


def make_layer(seed=0, columns=64):
    """Inputs with a few channels that are 20 times larger."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(200, columns, generator=generator)
    inputs[:, ::16] *= 20
    return inputs, torch.randn(48, columns, generator=generator)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 0.75, 1.0])
def test_it_is_smoothquant_and_vidit_q_up_to_a_common_factor(alpha):
    inputs, weight = make_layer()
    largest = inputs.abs().amax(0)
    factor = smoothing_scale(largest, weight, alpha=alpha)
    smooth = np.array(oracles_ptq.smoothquant_scale(largest.double().tolist(), weight.double().numpy(), alpha))
    for papers in (
        1 / smooth,
        weight.abs().amax(0).double().numpy() ** (1 - alpha) / largest.double().numpy() ** alpha,
    ):
        ratio = factor.double().numpy() / papers
        np.testing.assert_allclose(ratio, ratio[0], rtol=1e-6)  # float32
    assert factor.dtype == torch.float32
    assert (factor == 1).any()  # the middle channel keeps its unit
    assert torch.equal(smoothing_scale(largest, weight.abs().amax(0), alpha=alpha), factor)


def test_alpha_one_levels_the_inputs_and_alpha_zero_the_weight():
    inputs, weight = make_layer()
    largest = inputs.abs().amax(0)
    level = (inputs * smoothing_scale(largest, weight, alpha=1.0)).abs().amax(0)
    torch.testing.assert_close(level, level[:1].expand(64))
    level = (weight / smoothing_scale(largest, weight, alpha=0.0)).abs().amax(0)
    torch.testing.assert_close(level, level[:1].expand(64))


@pytest.mark.parametrize("value", [0.0, math.inf, math.nan])
def test_a_dead_channel_has_factor_one_and_harms_no_other(value):
    inputs, weight = make_layer()
    largest = inputs.abs().amax(0)
    alive = torch.arange(64) != 5
    expected = smoothing_scale(largest[alive], weight[:, alive], alpha=0.5)
    for side in range(2):
        a, w = largest.clone(), weight.clone()
        if side:
            w[:, 5] = value
        else:
            a[5] = value
        factor = smoothing_scale(a, w, alpha=0.5)
        assert factor[5] == 1
        assert torch.equal(factor[alive], expected)
    assert torch.equal(smoothing_scale(torch.zeros(64), weight, alpha=0.5), torch.ones(64))


@pytest.mark.parametrize("value", [0.0, math.inf])
def test_dead_channels_have_no_say_in_what_is_quiet(value):
    living = torch.tensor([1e-3, 1.0, 2.0, 3.0])  # the first is quieter than a tenth of the median
    with_dead = torch.cat([living, torch.full((5,), value)])
    expected = smoothing_scale(living, torch.ones(4), alpha=0.5)
    assert torch.equal(smoothing_scale(with_dead, torch.ones(9), alpha=0.5)[:4], expected)
    assert expected[0] == smoothing_scale(torch.tensor([0.1, 1.0, 2.0, 3.0]), torch.ones(4), alpha=0.5)[0]


@settings(max_examples=200)
@given(st.lists(st.tuples(st.floats(0, 2.0**127, width=32), st.floats(0, 2.0**127, width=32)), min_size=1, max_size=20),
       st.floats(0, 1))  # fmt: skip
def test_factors_are_bounded_whatever_the_statistics(pairs, alpha):
    a, w = torch.tensor(pairs).unbind(1)
    factor = smoothing_scale(a, w, alpha=alpha)
    assert factor.isfinite().all()
    assert (factor >= 0.99999 / MAX_FACTOR).all()
    assert (factor <= MAX_FACTOR).all()
    assert (factor[(a == 0) | (w == 0)] == 1).all()


def test_a_huge_channel_moves_no_other_far():
    """Its rank among the channels may change, so the middle moves to a neighbour: one common factor for all others."""
    inputs, weight = make_layer()
    largest = inputs.abs().amax(0)
    before = smoothing_scale(largest, weight, alpha=0.5)
    largest[9] = 1e30
    after = smoothing_scale(largest, weight, alpha=0.5)
    ratio = (after / before)[torch.arange(64) != 9]
    torch.testing.assert_close(ratio, ratio[:1].expand(63), rtol=1e-5, atol=0)
    assert 0.8 < ratio[0] < 1.25
    assert after[9] == pytest.approx(1 / MAX_FACTOR)


@pytest.mark.parametrize("transform", [None, lambda x: hadamard_transform(x, block_size=16)])
def test_the_search_takes_the_least_error(transform):
    inputs, weight = make_layer()
    largest = inputs.abs().amax(0)
    grids = {"weight_grid": WEIGHT_GRID, "activation_grid": INPUT_GRID, "transform": transform}
    alphas = (0.0, 0.25, 0.5, 0.75, 1.0)
    found, errors = search_alpha(inputs, weight, activation_abs_max=largest, alphas=alphas, **grids)
    alpha = alphas[errors.index(min(errors))]
    assert torch.equal(found, smoothing_scale(largest, weight, alpha=alpha))
    for candidate, error in zip(alphas, errors, strict=True):
        factor = smoothing_scale(largest, weight, alpha=candidate)
        sides = []
        for side, grid in ((inputs * factor, INPUT_GRID), (weight / factor, WEIGHT_GRID)):
            side = side if transform is None else transform(side)
            scale, zero = choose_qparams(side, grid=grid)
            sides.append(fake_quantize(side, scale=scale, zero_point=zero, grid=grid).double())
        exact = inputs.double() @ weight.double().T
        expected = (sides[0] @ sides[1].T - exact).square().sum() / exact.square().sum()
        assert error == pytest.approx(expected.item(), rel=1e-4)  # products in float32
    if transform is None:
        assert 0 < alpha < 1
        plain = output_error(inputs, weight, input_scale=torch.ones(64), **grids)
        assert min(errors) < 0.3 * plain


def test_equal_errors_keep_the_first_and_zeros_are_no_error():
    inputs, weight = make_layer()
    grids = {"weight_grid": WEIGHT_GRID, "activation_grid": INPUT_GRID}
    zeros = torch.zeros_like(weight)
    largest = inputs.abs().amax(0)
    found, errors = search_alpha(inputs, zeros, activation_abs_max=largest, alphas=(0.3, 0.7), **grids)
    assert errors == [0.0, 0.0]
    assert torch.equal(found, smoothing_scale(largest, zeros, alpha=0.3))


def test_where_smoothing_only_harms_the_search_leaves_it_out():
    """One entry of every channel and of every column is loud: maxima say nothing of the rest, and following them is worse."""
    generator = torch.Generator().manual_seed(0)
    inputs, weight = (torch.randn(rows, 64, generator=generator).clamp(-2, 2) for rows in (256, 96))
    places = torch.arange(64)
    inputs[places, places] = torch.linspace(2, 40, 64)
    weight[places, places.flip(0)] = torch.linspace(2, 40, 64)[torch.randperm(64, generator=generator)]
    grids = {"weight_grid": WEIGHT_GRID, "activation_grid": INPUT_GRID}
    largest = inputs.abs().amax(0)
    found, errors = search_alpha(inputs, weight, activation_abs_max=largest, alphas=(0.0, None, 1.0), **grids)
    assert errors[1] == output_error(inputs, weight, input_scale=torch.ones(64), **grids)
    assert errors[1] < 0.8 * min(errors[0], errors[2])
    assert torch.equal(found, torch.ones(64))
    _, errors = search_alpha(inputs, weight, activation_abs_max=largest, **grids)
    assert len(errors) == len(ALPHAS) == 22
    assert min(errors) <= errors[ALPHAS.index(None)]


def test_wrong_arguments():
    inputs, weight = make_layer()
    largest = inputs.abs().amax(0)
    for alpha in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=f"alpha={alpha}"):
            smoothing_scale(largest, weight, alpha=alpha)
    with pytest.raises(ValueError, match=r"\[63\] and weight \[48, 64\]"):
        smoothing_scale(largest[1:], weight, alpha=0.5)
    grids = {"weight_grid": WEIGHT_GRID, "activation_grid": INPUT_GRID, "activation_abs_max": largest}
    with pytest.raises(ValueError, match="alphas is empty"):
        search_alpha(inputs, weight, alphas=(), **grids)
    inputs[0, 0] = math.inf
    with pytest.raises(ValueError, match="not finite"):
        search_alpha(inputs, weight, **grids)
