"""LSQ+ weights: clamps and roundings of the learned numbers, gradients against float64 autograd of the oracle."""

import math

import pytest
import torch

from qvgen.quant.affine import choose_qparams, dequantize, quantize
from qvgen.quant.grid import Grid
from qvgen.quantizers.weight_lsq import WeightLSQ
from tests import oracles

KINDS = ("integer", "real", "none")


def make_grid(bits, kind="integer", group=None, scale_dtype="float32"):
    granularity = "per_group" if group else "per_channel"
    return Grid(bits=bits, granularity=granularity, zero_point=kind, group_size=group, scale_dtype=scale_dtype)


def make_weight(seed=0):
    return torch.randn(5, 32, generator=torch.Generator().manual_seed(seed)) * 0.1


def make_quantizer(grid, weight):
    quantizer = WeightLSQ(out_features=weight.shape[0], in_features=weight.shape[1], grid=grid)
    quantizer.start_from_(*choose_qparams(weight, grid=grid))
    return quantizer


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("group", [None, 16])
def test_it_starts_where_it_is_told(kind, group):
    weight, grid = make_weight(), make_grid(4, kind, group)
    scale, zero = choose_qparams(weight, grid=grid)
    quantizer = make_quantizer(grid, weight)
    for got, expected in zip(quantizer.qparams(), (scale, zero), strict=True):
        assert torch.equal(got, expected)
    codes = quantizer.codes(weight)
    assert torch.equal(codes, quantize(weight, scale=scale, zero_point=zero, grid=grid))
    values = quantizer.fake_quantize(weight)
    assert torch.equal(values, dequantize(codes, scale=scale, zero_point=zero, grid=grid))
    assert not values.requires_grad
    assert set(quantizer.state_dict()) == {"scale"} | ({"zero_point"} if kind != "none" else set())
    assert f"4 bits, {grid.granularity}, zero_point={kind}" in repr(quantizer)


def test_learned_numbers_are_clamped_where_they_are_used():
    grid = make_grid(3)
    quantizer = WeightLSQ(out_features=6, in_features=8, grid=grid)
    scale = torch.tensor([[1.0], [1e-8], [1e-9], [0.0], [-2.0], [1e30]])
    zero = torch.tensor([[-3.0], [2.5], [3.5], [7.4], [100.0], [0.5]])
    quantizer.start_from_(scale, zero)
    used_scale, used_zero = quantizer.qparams()
    assert torch.equal(used_scale, torch.tensor([[1.0], [1e-8], [1e-8], [1e-8], [1e-8], [1e30]]))
    assert used_zero.flatten().tolist() == [0.0, 2.0, 4.0, 7.0, 7.0, 0.0]  # halves round to even
    assert torch.equal(quantizer.scale, scale)  # the parameters themselves stay where they are
    assert torch.equal(quantizer.zero_point, zero)
    assert quantizer.fake_quantize(make_weight()[:1, :8].expand(6, 8)).isfinite().all()

    real = WeightLSQ(out_features=6, in_features=8, grid=make_grid(3, "real"))
    real.start_from_(scale, zero)
    assert torch.equal(real.qparams()[1].flatten(), torch.tensor([-3.0, 2.5, 3.5, 7.4, 100.0, 0.5]))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bit_scales_are_rounded_where_they_are_used(dtype):
    quantizer = WeightLSQ(out_features=3, in_features=8, grid=make_grid(4, "none", scale_dtype=dtype))
    scale = torch.tensor([[0.12345678], [0.0], [1e30]])
    quantizer.start_from_(scale, torch.zeros(3, 1))
    used = quantizer.qparams()[0]
    assert used[0] == scale[0].to(getattr(torch, dtype)).float()
    assert used.isfinite().all()
    assert (used > 0).all()
    assert torch.equal(quantizer.scale, scale)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("group", [None, 16])
def test_gradients_match_float64_autograd(kind, group):
    """The LSQ factor 1/sqrt(K qmax), the clamp of a zero point that has left the grid, and STE rounding."""
    for bits in range(2, 9):
        weight, grad = make_weight(bits), make_weight(bits + 50)
        grid = make_grid(bits, kind, group)
        quantizer = make_quantizer(grid, weight)
        with torch.no_grad():
            quantizer.scale.mul_(0.83)  # clamps the ends
            if quantizer.zero_point is not None:
                quantizer.zero_point.add_(0.3)
                quantizer.zero_point[1] = -2.0
                quantizer.zero_point[2] = 2.0**bits + 1
        form = oracles.LayerForm(
            weight_bits=bits, weight_kind=kind, activation_bits=8, activation_kind="integer", group=group or 0
        )
        params = {name: value.detach().double().requires_grad_() for name, value in quantizer.named_parameters()}
        params["weight"] = weight.double().requires_grad_()
        scale, zero = oracles.weight_qparams(form, params)
        size = group or 32
        rows = []
        for n in range(5):
            for g in range(32 // size):
                part = params["weight"][n, g * size : (g + 1) * size]
                distance = oracles.tie_distance(part.detach().numpy(), scale[n, g].item(), zero[n, g].item(), kind=kind)
                assert distance > 1e-4
                rows.append(oracles.ste_fake_quantize(part, scale[n, g], zero[n, g], bits=bits, kind=kind))
        torch.cat(rows).backward(grad.double().flatten())
        got = quantizer.gradients(grad, weight)
        assert quantizer.gradient_scale == pytest.approx(1 / math.sqrt(size * grid.qmax), rel=1e-15)
        # Sums of 32 float32 terms, up to 2^bits codes times a gradient of size 0.1.
        assert (got[0].double() - params["weight"].grad).abs().max() == 0
        bound = 1e-5 * 2**bits * quantizer.gradient_scale
        assert (got[1].double() - params["scale"].grad).abs().max() <= bound
        if kind == "none":
            assert got[2] is None
            assert quantizer.zero_point is None
        else:
            assert (got[2].double() - params["zero_point"].grad).abs().max() <= bound


def test_a_zero_point_that_left_the_grid_can_come_back():
    """A zero point of -2 acts like 0; negative weights are cut off, and the gradient pulls z up."""
    quantizer = WeightLSQ(out_features=1, in_features=4, grid=make_grid(2))
    quantizer.start_from_(torch.ones(1, 1), torch.full((1, 1), -2.0))
    weight = torch.tensor([[-1.0, -1.0, 0.0, 1.0]])
    error = quantizer.fake_quantize(weight) - weight
    assert error.tolist() == [[1.0, 1.0, 0.0, 0.0]]
    grad_zero = quantizer.gradients(error, weight)[2]
    assert grad_zero.item() == pytest.approx(-2 / math.sqrt(4 * 3))  # descent raises z


@pytest.mark.parametrize("kind", KINDS)
def test_a_disturbed_row_changes_no_other(kind):
    weight, grad = make_weight(), make_weight(9)
    grid = make_grid(3, kind)
    quantizer = make_quantizer(grid, weight)
    before = (quantizer.fake_quantize(weight), quantizer.codes(weight), *quantizer.gradients(grad, weight))
    others = torch.arange(5) != 2
    for value in (0.0, 4.0, 1e30):
        changed = weight.clone()
        changed[2] = value
        after = (quantizer.fake_quantize(changed), quantizer.codes(changed), *quantizer.gradients(grad, changed))
        for old, new in zip(before, after, strict=True):
            if old is not None:
                assert torch.equal(old[others], new[others])


def test_state_comes_back_bitwise():
    weight = make_weight()
    quantizer = make_quantizer(make_grid(3, "real"), weight)
    other = WeightLSQ(out_features=5, in_features=32, grid=make_grid(3, "real"))
    other.load_state_dict(quantizer.state_dict(), strict=True)
    assert torch.equal(other.fake_quantize(weight), quantizer.fake_quantize(weight))
    with pytest.raises(RuntimeError, match="zero_point"):
        WeightLSQ(out_features=5, in_features=32, grid=make_grid(3, "none")).load_state_dict(quantizer.state_dict())


def test_groups_must_divide():
    with pytest.raises(ValueError, match="group_size=24 does not divide in_features=32"):
        WeightLSQ(out_features=5, in_features=32, grid=make_grid(3, group=24))
