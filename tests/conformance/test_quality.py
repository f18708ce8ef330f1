"""How good PTQ methods are on single layers and a small model, against the ratios that quality.py states of them."""

import pytest
import torch

from qvgen.config.leaves import load_leaf
from tests.conformance.initializer_cases import (
    PAIRS,
    initialized,
    made_layer,
    make_statistics,
    make_weight,
    output_error,
    prepared,
    relative_error,
    statistics_of,
)
from tests.conformance.quality import QUALITY
from tests.layers.model import make_inputs, make_model
from tests.profiles import COLUMNS, make_profile

STATED = [pair for pair in PAIRS if pair[0] in QUALITY]
stated = pytest.mark.parametrize(("name", "profile_name"), STATED)


def test_there_are_entries():
    assert "rtn" in QUALITY
    assert len(STATED) > len(QUALITY) > 1


@pytest.mark.parametrize(
    ("name", "profile_name"), [pair for pair in STATED if QUALITY[pair[0]].weight_error is not None]
)
def test_the_error_is_that_of_a_uniform_grid(name, profile_name):
    """Between 2^b levels over the whole range and a sane multiple: a quarter of it per bit, below 1 at 3 bits."""
    factor = QUALITY[name].weight_error
    worst = {}
    for bits in range(3, 9):
        profile = make_profile(profile_name, weight_bits=bits, activation_bits=8)
        layer = initialized(name, profile, make_weight())
        errors = relative_error(layer)
        worst[bits] = max(errors)
        # A step of the range (at most 2 max|w|) / qmax and an error of s^2 / 12 per weight; a factor for a range
        # that is cut and for rows where all errors are on one side.
        size = layer.weight.detach().abs().amax(1)
        step = 2 * size / (2**bits - 2)
        expected = COLUMNS * step.square() / 12 / layer.weight.detach().square().sum(1)
        assert all(error <= factor * bound for error, bound in zip(errors, expected.tolist(), strict=True)), bits
    assert worst[3] < 1
    assert all(worst[bits + 1] < 0.6 * worst[bits] for bits in range(3, 8))  # a quarter, less what clipping gives up


@pytest.mark.parametrize(("name", "profile_name"), [pair for pair in STATED if load_leaf("init", pair[0]).needs])
def test_special_input_channels_are_bounded(name, profile_name):
    """A channel that was silent while calibrating may speak later; a huge one is no worse than without the method."""
    profile = make_profile(profile_name, weight_bits=4, activation_bits=8)
    usual = output_error(initialized(name, profile, make_weight()), make_statistics().inputs)
    for value in (0.0, 1e-30, 1e4):
        x = make_statistics().inputs.clone()
        x[:, 9] = value
        layer = made_layer(profile, make_weight())
        load_leaf("init", name).initialize_(layer, statistics=statistics_of(x, inputs=x))
        if value < 1:
            assert output_error(layer, make_statistics().inputs) < 5 * usual + 1e-3
        else:
            assert output_error(layer, x) <= 1.1 * output_error(initialized("rtn", profile, make_weight()), x)


@stated
def test_on_outliers_it_is_no_worse_than_round_to_nearest(name, profile_name):
    profile = make_profile(profile_name, weight_bits=4, activation_bits=4)
    x = make_statistics().inputs
    error, plain = (output_error(initialized(kind, profile, make_weight()), x) for kind in (name, "rtn"))
    # no method sees the error of the inputs' own rounding, which is most of it here
    assert error <= QUALITY[name].outlier_error * plain


@pytest.mark.parametrize(("name", "profile_name"), [pair for pair in STATED if pair[1] in ("paper", "convrot")])
def test_a_whole_model_is_better_with_more_bits_and_with_phi(name, profile_name):
    inputs = make_inputs()
    with torch.no_grad():
        exact = make_model(num_blocks=1)(*inputs)

        def error(bits, phi_rank):
            model = prepared(name, profile_name, bits=bits, phi_rank=phi_rank)
            return ((model(*inputs) - exact).norm() / exact.norm()).item()

        assert error(8, 0) < error(4, 0) < error(2, 0)
        assert error(2, 8) < error(2, 0)
