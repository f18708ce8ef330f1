"""Static tables: their gradients against finite differences of the straight-through model, and what they hold."""

import math

import pytest
import torch

from qvgen.quant.grid import Grid
from qvgen.quantizers.activation_static import ActivationStatic, whole_zero_point

STEPS, COLUMNS = 5, 64


def make_quantizer(*, bits: int = 4, zero_point: str = "integer") -> ActivationStatic:
    grid = Grid(bits=bits, granularity="per_tensor", zero_point=zero_point)  # type: ignore[arg-type]
    return ActivationStatic(grid=grid, num_bands=STEPS, in_features=COLUMNS)


def test_tables_are_empty_until_a_method_fills_them() -> None:
    quantizer = make_quantizer()
    assert all(math.isnan(value) for value in quantizer.tables()[0].tolist())
    scale, zero = torch.linspace(0.1, 0.5, STEPS), torch.linspace(0, 14.6, STEPS)
    quantizer.start_from_(scale, zero)
    assert torch.equal(quantizer.tables()[0], scale)
    assert torch.equal(quantizer.tables()[1], zero)


def test_a_scale_that_trained_below_zero_is_used_as_the_smallest() -> None:
    quantizer = make_quantizer()
    quantizer.start_from_(torch.tensor([-1.0, 0.0, 1e-9, 0.5, 2.0]), torch.zeros(STEPS))
    assert quantizer.tables()[0].tolist() == pytest.approx([1e-8, 1e-8, 1e-8, 0.5, 2.0])


@pytest.mark.parametrize(("bits", "qmax"), [(4, 15), (8, 255)])
def test_gradients_carry_lsqs_factor(bits: int, qmax: int) -> None:
    quantizer = make_quantizer(bits=bits)
    quantizer.start_from_(torch.ones(STEPS), torch.ones(STEPS))
    scale, zero = quantizer.tables()
    (scale * 3 + zero * 5).sum().backward()
    factor = 1 / math.sqrt(COLUMNS * qmax)
    assert quantizer.scale.grad.tolist() == pytest.approx([3 * factor] * STEPS)
    assert quantizer.zero_point.grad.tolist() == pytest.approx([5 * factor] * STEPS)


def test_zero_points_become_whole_codes_and_their_gradient_goes_through() -> None:
    grid = make_quantizer().grid
    values = torch.tensor([-3.0, 0.4, 0.6, 7.5, 8.5, 14.6, 99.0], requires_grad=True)
    whole = whole_zero_point(values, grid)
    assert whole.tolist() == [0, 0, 1, 8, 8, 15, 15]
    whole.sum().backward()
    assert values.grad.tolist() == [1.0] * 7


def test_symmetric_grids_have_no_zero_point() -> None:
    quantizer = make_quantizer(zero_point="none")
    assert quantizer.zero_point is None
    quantizer.start_from_(torch.ones(STEPS), torch.zeros(STEPS))
    assert torch.equal(quantizer.tables()[1], torch.zeros(STEPS))
    assert [name for name, _ in quantizer.named_parameters()] == ["scale"]


def test_it_says_what_it_is() -> None:
    assert repr(make_quantizer(bits=8)) == "ActivationStatic(8 bits, static, steps=5)"
