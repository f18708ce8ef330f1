"""One suite over every PTQ method of conf/init, under every profile of conf/profile. A new leaf is tested unasked."""

import pytest
import torch
from torch import nn

from qvgen.config.leaves import conf_directory, load_leaf
from qvgen.initializers.base import LayerStatistics, StepRanges
from qvgen.initializers.calibration import Calibration
from qvgen.initializers.prepare import PrepareConfig, prepare
from qvgen.layers.fake_quant_linear import FakeQuantLinear
from qvgen.layers.fake_quant_product import to_grid_input
from qvgen.layers.noise_band import NoiseBand
from qvgen.layers.packed_linear import PackedLinear
from qvgen.layers.swap import quantized_layers
from tests.layers.model import make_inputs, make_model
from tests.profiles import COLUMNS, PROFILES, make_profile

INITIALIZERS = sorted(path.stem for path in (conf_directory() / "init").glob("*.yaml"))
ROWS = 12

REFUSED = {("static", "convrot"): "init=static has no rotation"}
"""Pairs that can't be, and what is said about them."""

PAIRS = [(name, profile) for name in INITIALIZERS for profile in PROFILES if (name, profile) not in REFUSED]
pairs = pytest.mark.parametrize(("name", "profile_name"), PAIRS)


@pytest.mark.parametrize(("pair", "message"), REFUSED.items())
def test_what_cannot_be_is_refused(pair, message):
    with pytest.raises(ValueError, match=message):
        initialized(pair[0], make_profile(pair[1]), make_weight())


@pairs
def test_there_are_leaves_to_test(name, profile_name):
    assert {"rtn", "mse"} <= set(INITIALIZERS)
    assert name
    assert profile_name


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


@pairs
def test_the_error_is_that_of_a_uniform_grid(name, profile_name):
    """Between 2^b levels over the whole range and a sane multiple: a quarter of it per bit, below 1 at 3 bits."""
    if "second_moment" in load_leaf("init", name).needs:
        return  # it rounds for the least error of the output, not of the weight
    worst = {}
    for bits in range(3, 9):
        profile = make_profile(profile_name, weight_bits=bits, activation_bits=8)
        layer = initialized(name, profile, make_weight())
        scale, zero = layer.weight_quantizer.qparams()
        assert scale.isfinite().all()
        assert (scale > 0).all()
        assert ((zero >= 0) & (zero <= profile.weight.qmax)).all()
        errors = relative_error(layer)
        worst[bits] = max(errors)
        # A step of the range (at most 2 max|w|) / qmax and an error of s^2 / 12 per weight; a factor 3 for a range
        # that is cut and for rows where all errors are on one side.
        size = layer.weight.detach().abs().amax(1)
        step = 2 * size / (2**bits - 2)
        expected = COLUMNS * step.square() / 12 / layer.weight.detach().square().sum(1)
        assert all(error <= 3 * bound for error, bound in zip(errors, expected.tolist(), strict=True)), bits
    assert worst[3] < 1
    assert all(worst[bits + 1] < 0.6 * worst[bits] for bits in range(3, 8))  # a quarter, less what clipping gives up


@pairs
def test_two_bits_work(name, profile_name):
    layer = initialized(name, make_profile(profile_name, weight_bits=2), make_weight())
    assert layer.quantized_weight().isfinite().all()
    assert layer.weight_quantizer.codes(layer.weight).float().std() > 0


@pairs
def test_the_same_weight_gives_the_same_bits(name, profile_name):
    profile = make_profile(profile_name)
    first, second = (initialized(name, profile, make_weight()) for _ in range(2))
    for key, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[key])
    if not torch.equal(first.weight, initialized("rtn", profile, make_weight()).weight):
        return  # the master weight was moved to other coordinates, or rounded
    # And over again on the same layer: nothing of the first time stays.
    initialize_(name, first)
    for key, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[key])


@pairs
def test_special_rows_harm_no_other(name, profile_name):
    """Bitwise, but where input channels are balanced against the weight's columns, which all rows share."""
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
        if before.input_scale is not None:
            errors = relative_error(layer)
            assert all(errors[row] < 0.5 for row in range(ROWS) if row != 5)
            continue
        for new, old in zip(layer.weight_quantizer.qparams(), before.weight_quantizer.qparams(), strict=True):
            assert torch.equal(new[others], old[others])
            assert new.isfinite().all()
        assert torch.equal(values[others], before.quantized_weight()[others])


@pairs
def test_special_input_channels_are_bounded(name, profile_name):
    """A channel that was silent while calibrating may speak later; a huge one is no worse than without the method."""
    if not load_leaf("init", name).needs:
        return
    profile = make_profile(profile_name, weight_bits=4, activation_bits=8)
    usual = output_error(initialized(name, profile, make_weight()), make_statistics().inputs)
    for value in (0.0, 1e-30, 1e4):
        x = make_statistics().inputs.clone()
        x[:, 9] = value
        statistics = statistics_of(x, inputs=x)
        layer = made_layer(profile, make_weight())
        load_leaf("init", name).initialize_(layer, statistics=statistics)
        assert all(tensor.isfinite().all() for tensor in layer.state_dict().values())
        if value < 1:
            assert output_error(layer, make_statistics().inputs) < 5 * usual + 1e-3
        else:
            assert output_error(layer, x) <= 1.1 * output_error(initialized("rtn", profile, make_weight()), x)


@pairs
def test_coordinates_alone_change_nothing(name, profile_name):
    """The returned weight on the layer's own input gives the full-precision layer's output; the bias is left alone."""
    weight = make_weight()
    layer = made_layer(make_profile(profile_name), weight)
    names = parameters_besides_tables(layer)
    target = initialize_(name, layer)
    x = make_statistics().inputs.double()
    moved = to_grid_input(x.float(), layer.input_scale, rotation=layer.profile.rotation).double()
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
def test_on_outliers_it_is_no_worse_than_round_to_nearest(name, profile_name):
    profile = make_profile(profile_name, weight_bits=4, activation_bits=4)
    x = make_statistics().inputs
    error, plain = (output_error(initialized(kind, profile, make_weight()), x) for kind in (name, "rtn"))
    assert error <= 1.1 * plain  # no method sees the error of the inputs' own rounding, which is most of it here


def output_error(layer, x):
    """|y - y_exact|^2 / |y_exact|^2 of a layer."""
    layer.noise_band.set_timestep(torch.tensor(500))
    with torch.no_grad():
        exact = x @ make_weight().mT + make_weight()[:, 0]
        return ((layer(x) - exact).norm() / exact.norm()).square().item()


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
    """Better with more bits, and with Phi than without, against the full-precision model."""
    inputs = make_inputs()
    with torch.no_grad():
        exact = make_model()(*inputs)

        def error(bits, phi_rank):
            model = make_model()
            profile = make_profile(profile_name, weight_bits=bits, activation_bits=8)
            initializer = load_leaf("init", name)
            names = [key for key, module in model.named_modules() if isinstance(module, nn.Linear)]
            watch = Calibration(model, names=names, needs=initializer.needs, num_bands=50, seed=0)
            with watch:
                model(*inputs)
            prepare(
                model,
                PrepareConfig(profile=profile, initializer=initializer, phi_rank=phi_rank, statistics=watch.statistics),
            )
            assert len(quantized_layers(model)) == 7
            return ((model(*inputs) - exact).norm() / exact.norm()).item()

        assert error(8, 0) < error(4, 0) < error(2, 0)
        assert error(2, 8) < error(2, 0)
