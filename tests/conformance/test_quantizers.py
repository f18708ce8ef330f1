"""One suite over every quantizer class of qvgen/quantizers, under every profile and bit-width.

A class is found by its name: Weight* is given a weight, Activation* the rows of an input.
"""

import importlib
import inspect
import pkgutil

import pytest
import torch
from torch import nn

from qvgen import quantizers
from qvgen.quant.affine import choose_qparams, dequantize, fake_quantize, quantize
from qvgen.quant.grid import static_grid
from tests.profiles import COLUMNS, PROFILES, make_profile

NAMES = [info.name for info in pkgutil.iter_modules(quantizers.__path__)]
MODULES = [importlib.import_module(f"{quantizers.__name__}.{name}") for name in NAMES]
CLASSES = [
    member
    for module in MODULES
    for _, member in inspect.getmembers(module, inspect.isclass)
    if member.__module__ == module.__name__ and issubclass(member, nn.Module)
]
WEIGHTS = [member for member in CLASSES if member.__name__.startswith("Weight")]
ACTIVATIONS = [member for member in CLASSES if member.__name__.startswith("Activation")]
DYNAMIC = [member for member in ACTIVATIONS if "Dynamic" in member.__name__]
ROWS, BANDS = 6, 4

over_weights = [pytest.mark.parametrize("quantizer_class", WEIGHTS), pytest.mark.parametrize("profile_name", PROFILES)]
over_dynamic = [pytest.mark.parametrize("quantizer_class", DYNAMIC), pytest.mark.parametrize("profile_name", PROFILES)]
over_activations = [
    pytest.mark.parametrize("quantizer_class", ACTIVATIONS),
    pytest.mark.parametrize("profile_name", PROFILES),
]


def every(marks):
    def decorate(test):
        for mark in marks:
            test = mark(test)
        return test

    return decorate


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_weight_quantizer(quantizer_class, grid, weight):
    quantizer = quantizer_class(out_features=weight.shape[0], in_features=weight.shape[1], grid=grid)
    quantizer.start_from_(*choose_qparams(weight, grid=grid))
    return quantizer


def test_every_module_holds_quantizers_that_are_tested_here():
    assert WEIGHTS
    assert ACTIVATIONS
    assert set(CLASSES) == set(WEIGHTS) | set(ACTIVATIONS)
    assert {member.__module__ for member in CLASSES} == {module.__name__ for module in MODULES}


@every(over_weights)
def test_the_trained_weight_is_its_dequantized_codes(quantizer_class, profile_name):
    for bits in range(2, 9):
        grid, weight = make_profile(profile_name, weight_bits=bits).weight, draw(ROWS, COLUMNS, seed=bits)
        quantizer = make_weight_quantizer(quantizer_class, grid, weight)
        with torch.no_grad():  # as after some training: no longer the range of the weight
            for parameter in quantizer.parameters():
                parameter.mul_(0.9).add_(0.013)
        scale, zero = quantizer.qparams()
        codes = quantizer.codes(weight)
        assert (scale > 0).all()
        assert int(codes.min()) >= grid.qmin
        assert int(codes.max()) <= grid.qmax
        values = quantizer.fake_quantize(weight)
        assert values.dtype == torch.float32
        assert torch.equal(values, dequantize(codes, scale=scale, zero_point=zero, grid=grid))
        assert torch.equal(quantizer.fake_quantize(values), values)
        assert not values.requires_grad


@every(over_weights)
def test_weight_gradients_are_finite_for_any_rows(quantizer_class, profile_name):
    grid = make_profile(profile_name).weight
    weight = draw(ROWS, COLUMNS)
    for row, value in enumerate((0.0, 0.3, -0.3, 1e20)):
        weight[row] = value
    quantizer = make_weight_quantizer(quantizer_class, grid, weight)
    grads = quantizer.gradients(draw(ROWS, COLUMNS, seed=1), weight)
    for grad, shape in zip(grads, (weight.shape, quantizer.scale.shape, quantizer.scale.shape), strict=True):
        if grad is not None:
            assert grad.shape == shape
            assert grad.isfinite().all()


@every(over_weights)
def test_a_weight_row_is_by_itself(quantizer_class, profile_name):
    grid, weight, grad = make_profile(profile_name).weight, draw(ROWS, COLUMNS), draw(ROWS, COLUMNS, seed=1)
    others = torch.arange(ROWS) != 2

    def outcome(weight):
        quantizer = make_weight_quantizer(quantizer_class, grid, weight)
        return [quantizer.fake_quantize(weight), quantizer.codes(weight), *quantizer.gradients(grad, weight)]

    before = outcome(weight)
    for value in (0.0, -7.0, 1e20):
        changed = weight.clone()
        changed[2] = value
        for old, new in zip(before, outcome(changed), strict=True):
            assert (old is None) == (new is None)
            assert old is None or torch.equal(old[others], new[others])


@every(over_weights)
def test_weight_state_comes_back_bitwise(quantizer_class, profile_name):
    grid, weight = make_profile(profile_name).weight, draw(ROWS, COLUMNS)
    quantizer = make_weight_quantizer(quantizer_class, grid, weight)
    other = quantizer_class(out_features=ROWS, in_features=COLUMNS, grid=grid)
    other.load_state_dict(quantizer.state_dict(), strict=True)
    assert torch.equal(other.codes(weight), quantizer.codes(weight))
    assert torch.equal(other.fake_quantize(weight), quantizer.fake_quantize(weight))
    assert {parameter.dtype for parameter in quantizer.parameters()} == {torch.float32}
    assert all(parameter.ndim >= 1 for parameter in quantizer.parameters())


def make_activation_quantizer(quantizer_class, profile_name):
    grid = make_profile(profile_name).activation
    if quantizer_class in DYNAMIC:
        return quantizer_class(grid=grid, num_bands=BANDS, start=0.9)
    return quantizer_class(grid=static_grid(grid), num_bands=BANDS, in_features=COLUMNS)


@every(over_dynamic)
def test_clip_tables_are_factors_by_band(quantizer_class, profile_name):
    grid = make_profile(profile_name).activation
    quantizer = quantizer_class(grid=grid, num_bands=BANDS, start=0.9)
    with torch.no_grad():
        for parameter in quantizer.parameters():
            parameter.copy_(draw(*parameter.shape) * 30)
    tables = quantizer.tables()
    assert (tables[1] is not None) == grid.clip
    for table in filter(lambda each: each is not None, tables):
        assert table.shape == (BANDS,)
        assert table.dtype == torch.float32
        assert ((table >= 0) & (table <= 1)).all()


@every(over_dynamic)
def test_clipped_inputs_stay_on_one_grid(quantizer_class, profile_name):
    x = draw(BANDS, COLUMNS)
    for bits in range(2, 9):
        grid = make_profile(profile_name, activation_bits=bits).activation
        tables = quantizer_class(grid=grid, num_bands=BANDS, start=0.9).tables()
        low, high = (None if table is None else table.detach()[:, None] for table in tables)
        scale, zero = choose_qparams(x, grid=grid, clip_low=low, clip_high=high)
        codes = quantize(x, scale=scale, zero_point=zero, grid=grid)
        values = fake_quantize(x, scale=scale, zero_point=zero, grid=grid)
        assert torch.equal(values, dequantize(codes, scale=scale, zero_point=zero, grid=grid))
        # A clip shortens the range; half a step of it, whole zero points, and the two ends add two more halves.
        wide, _ = choose_qparams(x, grid=grid)
        assert (scale <= wide).all()


@every(over_activations)
def test_activation_state_comes_back_bitwise(quantizer_class, profile_name):
    quantizer, other = (make_activation_quantizer(quantizer_class, profile_name) for _ in range(2))
    with torch.no_grad():
        for parameter in quantizer.parameters():
            parameter.copy_(draw(*parameter.shape))
    other.load_state_dict(quantizer.state_dict(), strict=True)
    for got, expected in zip(other.tables(), quantizer.tables(), strict=True):
        assert (got is expected is None) or torch.equal(got, expected)
