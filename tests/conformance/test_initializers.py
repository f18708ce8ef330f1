"""The contract that every PTQ method of conf/init keeps under every profile of conf/profile. A new leaf is tested unasked.

Finite, the same again, rows by themselves, coordinates without effect, codes that come back. How good a method is, is no part
of it: see quality.py.
"""

import pytest
import torch

from qvgen.config.leaves import load_leaf
from qvgen.initializers.base import Smoothing
from qvgen.layers.fake_quant_product import to_grid_input
from qvgen.layers.layer_form import LayerForm
from qvgen.layers.packed_linear import PackedLinear
from qvgen.layers.swap import quantized_layers
from tests.conformance.initializer_cases import (
    INITIALIZERS,
    PAIRS,
    REFUSED,
    ROWS,
    initialize_,
    initialized,
    made_layer,
    make_statistics,
    make_weight,
    prepared,
    relative_error,
    statistics_of,
)
from tests.layers.model import make_inputs
from tests.profiles import COLUMNS, make_profile

pairs = pytest.mark.parametrize(("name", "profile_name"), PAIRS)
CALIBRATED = [(name, profile) for name, profile in PAIRS if load_leaf("init", name).needs]
BALANCING = [name for name in INITIALIZERS if isinstance(load_leaf("init", name), Smoothing)]
"""Methods that balance input channels against the weight's columns, which all rows share."""

_UNMOVED = initialized("rtn", make_profile("paper"), make_weight()).weight
IN_PLACE = [
    name for name in INITIALIZERS if initialized(name, make_profile("paper"), make_weight()).weight.equal(_UNMOVED)
]
"""Methods that leave the master weight as it is: neither moved to other coordinates nor rounded."""


@pytest.mark.parametrize(("pair", "message"), REFUSED.items())
def test_what_cannot_be_is_refused(pair, message):
    with pytest.raises(ValueError, match=message):
        initialized(pair[0], make_profile(pair[1]), make_weight())


def test_there_are_leaves_to_test():
    assert "rtn" in IN_PLACE
    assert set(INITIALIZERS) == {name for name, _ in PAIRS}
    for some in ({name for name, _ in CALIBRATED}, set(BALANCING), set(IN_PLACE)):
        assert set() < some < set(INITIALIZERS)


@pairs
def test_scales_and_zero_points_are_of_the_grid(name, profile_name):
    for bits in (2, 3, 4, 8):
        layer = initialized(name, make_profile(profile_name, weight_bits=bits, activation_bits=8), make_weight())
        scale, zero = layer.weight_quantizer.qparams()
        assert scale.isfinite().all()
        assert (scale > 0).all()
        assert ((zero >= 0) & (zero <= layer.profile.weight.qmax)).all()
        assert layer.profile.weight.bits == bits
        assert layer.quantized_weight().isfinite().all()
        assert layer.weight_quantizer.codes(layer.weight).float().std() > 0


@pairs
def test_what_is_added_to_a_layer_is_what_the_method_says(name, profile_name):
    """So that a profile can refuse it before anything is computed."""
    profile = make_profile(profile_name)
    form = LayerForm.of(initialized(name, profile, make_weight()))
    added = {
        "rotation": (form.profile.rotation, form.profile.rotation_kind) != (profile.rotation, profile.rotation_kind),
        "smoothing": form.input_scale,
        "branch": form.branch_rank > 0,
        "static": form.static,
        "widths": form.width_table is not None,
    }
    assert {what for what, is_added in added.items() if is_added} <= set(
        getattr(load_leaf("init", name), "additions", ())
    )
    unrotated = make_profile("paper")
    if profile == unrotated:
        assert added["smoothing"] == ("smoothing" in getattr(load_leaf("init", name), "additions", ()))


@pairs
def test_the_same_weight_gives_the_same_bits(name, profile_name):
    profile = make_profile(profile_name)
    first, second = (initialized(name, profile, make_weight()) for _ in range(2))
    assert_same_state(first, second)


@pairs
def test_nothing_of_an_earlier_layer_stays(name, profile_name):
    """A method that has set another layer up gives the bits of one that has seen none."""
    profile, used = make_profile(profile_name), load_leaf("init", name)
    statistics = make_statistics() if used.needs else None
    for seed in (5, 0):
        layer = made_layer(profile, make_weight(seed))
        used.initialize_(layer, statistics=statistics)
    assert_same_state(layer, initialized(name, profile, make_weight()))


@pytest.mark.parametrize(("name", "profile_name"), [pair for pair in PAIRS if pair[0] in IN_PLACE])
def test_over_again_on_the_same_layer_nothing_of_the_first_time_stays(name, profile_name):
    first, again = (initialized(name, make_profile(profile_name), make_weight()) for _ in range(2))
    initialize_(name, again)
    assert_same_state(first, again)


def assert_same_state(first, second):
    assert first.state_dict().keys() == second.state_dict().keys()
    for key, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[key]), key


@pairs
def test_special_rows_harm_no_other(name, profile_name):
    """Bitwise, but for :data:`BALANCING`: there every row has errors of a grid still."""
    profile = make_profile(profile_name)
    before = initialized(name, profile, make_weight())
    others = torch.arange(ROWS) != 5
    for value in (0.0, 0.5, -0.5, 1e-30, 1e20):
        weight = make_weight()
        weight[5] = value
        layer = initialized(name, profile, weight)
        values = layer.quantized_weight()
        assert values.isfinite().all()
        assert (layer.weight_quantizer.scale > 0).all()
        if value == 0.0:
            small = 0.0 if layer.branch_down is None else 1e-12  # of the decomposition
            assert (values[5].abs() <= small).all()
        assert all(value.isfinite().all() for value in layer.weight_quantizer.qparams())
        if name in BALANCING and before.input_scale is not None:
            errors = relative_error(layer)
            assert all(errors[row] < 0.5 for row in range(ROWS) if row != 5)
        else:
            for new, old in zip(layer.weight_quantizer.qparams(), before.weight_quantizer.qparams(), strict=True):
                assert torch.equal(new[others], old[others])
            assert torch.equal(values[others], before.quantized_weight()[others])


@pytest.mark.parametrize(("name", "profile_name"), CALIBRATED)
def test_special_input_channels_leave_finite_layers(name, profile_name):
    profile = make_profile(profile_name, weight_bits=4, activation_bits=8)
    for value in (0.0, 1e-30, 1e4):
        x = make_statistics().inputs.clone()
        x[:, 9] = value
        layer = made_layer(profile, make_weight())
        load_leaf("init", name).initialize_(layer, statistics=statistics_of(x, inputs=x))
        assert all(tensor.isfinite().all() for tensor in layer.state_dict().values())


@pairs
def test_coordinates_alone_change_nothing(name, profile_name):
    """The returned weight on the layer's own input gives the full-precision layer's output; the bias is left alone."""
    weight = make_weight()
    layer = made_layer(make_profile(profile_name), weight)
    names = parameters_besides_tables(layer)
    target = initialize_(name, layer)
    x = make_statistics().inputs.double()
    moved = to_grid_input(x.float(), layer.input_scale, profile=layer.profile).double()
    exact = x @ weight.double().mT
    found = moved @ target.double().mT
    if layer.branch_down is not None:
        found = found + x @ layer.branch_down.double().mT @ layer.branch_up.double().mT
    assert (found - exact).norm() <= 1e-5 * exact.norm()  # float32 butterflies and quotients
    assert torch.equal(layer.bias, weight[:, 0])
    assert parameters_besides_tables(layer) == names
    assert all(parameter.requires_grad for parameter in layer.parameters())
    assert all(parameter.grad is None for parameter in layer.parameters())


def parameters_besides_tables(layer):
    """Static activations have other tables than dynamic ones."""
    return [key for key, _ in layer.named_parameters() if not key.startswith("activation_quantizer")]


@pairs
def test_the_whole_way_of_a_layer(name, profile_name):
    """Start, forward and backward pass, fold: finite, and the codes are those that were trained."""
    profile = make_profile(profile_name)
    layer = initialized(name, profile, make_weight())
    layer.noise_band.set_timestep(torch.tensor(500))
    x = torch.randn(5, COLUMNS, generator=torch.Generator().manual_seed(1))
    layer(x).square().mean().backward()
    assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())
    packed = PackedLinear.from_fake_quant(layer)
    assert torch.equal(packed.integer_codes(), layer.weight_quantizer.codes(layer.weight))
    assert packed(x).isfinite().all()


@pairs
def test_a_whole_model_is_prepared(name, profile_name):
    """From the calibration's hooks to every layer, with Phi beside it."""
    model = prepared(name, profile_name, bits=3, phi_rank=4)
    assert sorted(quantized_layers(model)) == ["blocks.0.down", "blocks.0.modulation", "blocks.0.up", "output"]
    with torch.no_grad():
        assert model(*make_inputs()).isfinite().all()
