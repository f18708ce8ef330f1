"""GPTQ against sequential optimal brain quantization with a full inverse at every step, in float64."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qvgen.quant.affine import choose_qparams, dequantize, quantize
from qvgen.quant.gptq import gptq_round
from qvgen.quant.grid import Grid
from tests import oracles_ptq

KINDS = ("integer", "real", "none")


def make_grid(bits, kind="integer", group=None):
    return Grid(bits=bits, granularity="per_group" if group else "per_channel", zero_point=kind, group_size=group)


def make_problem(rows, columns, seed=0, samples=None):
    """A weight and the second moment of correlated inputs with channels of many sizes."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.eye(columns) + torch.randn(columns, columns, generator=generator) / columns**0.5
    inputs = torch.randn(samples or 4 * columns, columns, generator=generator) @ mix
    inputs = inputs * torch.randn(columns, generator=generator).exp()
    return torch.randn(rows, columns, generator=generator), inputs.mT @ inputs


def run(weight, moment, grid, **options):
    scale, zero = choose_qparams(weight, grid=grid)
    return gptq_round(weight, moment, scale=scale, zero_point=zero, grid=grid, **options)


def nearest(weight, grid):
    scale, zero = choose_qparams(weight, grid=grid)
    return quantize(weight, scale=scale, zero_point=zero, grid=grid)


def cost(codes, weight, moment, grid):
    """Per row, float64."""
    scale, zero = choose_qparams(weight, grid=grid)
    error = (weight - dequantize(codes, scale=scale, zero_point=zero, grid=grid)).double()
    return ((error @ moment.double()) * error).sum(1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("group", [None, 4])
@pytest.mark.parametrize("order", ["activation", "natural"])
def test_codes_are_those_of_the_sequential_update(kind, group, order):
    """All codes equal, but in rows that pass within 1e-4 of a tie or where rounding to nearest is better."""
    compared = changed = 0
    for seed in range(6):
        for bits in (2, 3, 4):
            grid = make_grid(bits, kind, group)
            weight, moment = make_problem(8, 12, seed)
            codes, plain = run(weight, moment, grid, order=order), nearest(weight, grid)
            scale, zero = (value.double().numpy() for value in choose_qparams(weight, grid=grid))
            hessian = moment.double().numpy()
            damped = hessian + 0.01 * np.mean(np.diag(hessian)) * np.eye(12)
            sequence = np.argsort(-np.diag(hessian)) if order == "activation" else np.arange(12)
            size = group or 12
            for n in range(8):
                expected, tie = oracles_ptq.optimal_brain_quantization(
                    weight[n].double().numpy(), damped, np.repeat(scale[n], size), np.repeat(zero[n], size),
                    order=sequence, bits=bits, kind=kind,
                )  # fmt: skip
                expected = torch.from_numpy(expected)
                forms = [cost(c.expand(8, -1), weight, moment, grid)[n] for c in (expected, plain[n])]
                if tie < 1e-4 or 0 < abs(forms[0] - forms[1]) < 1e-5 * forms[1]:
                    continue
                assert torch.equal(codes[n].double(), expected if forms[0] < forms[1] else plain[n].double())
                compared += 1
                changed += not torch.equal(codes[n], plain[n])
    assert compared > 120
    assert changed > 60


@pytest.mark.parametrize("kind", KINDS)
def test_a_diagonal_moment_is_rounding_to_nearest(kind):
    for group in (None, 16):
        weight, moment = make_problem(7, 160)  # more than one block
        for order in ("activation", "natural"):
            codes = run(weight, moment.diagonal().diag(), make_grid(3, kind, group), order=order)
            assert torch.equal(codes, nearest(weight, make_grid(3, kind, group)))
            assert codes.dtype == nearest(weight, make_grid(3, kind)).dtype


def test_it_is_better_by_a_lot_over_more_than_one_block():
    weight, moment = make_problem(16, 300)
    for bits in (3, 4):
        for group in (None, 60):
            grid = make_grid(bits, group=group)
            plain = cost(nearest(weight, grid), weight, moment, grid)
            forms = [cost(run(weight, moment, grid, order=o), weight, moment, grid) for o in ("activation", "natural")]
            assert (forms[0] <= plain).all()
            assert forms[0].sum() < 0.7 * plain.sum()
            assert forms[0].sum() < forms[1].sum()  # what act-order is for, with channels of many sizes


def test_activation_order_does_not_see_the_order_of_the_columns():
    weight, moment = make_problem(8, 40)
    permutation = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    codes = run(weight, moment, make_grid(4))
    permuted = run(weight[:, permutation], moment[permutation][:, permutation], make_grid(4))
    assert torch.equal(permuted, codes[:, permutation])
    # Codes don't depend on the unit of the inputs (a power of two: the damping is relative), nor on the dtype of H.
    assert torch.equal(run(weight, moment * 2.0**-90, make_grid(4)), codes)
    assert torch.equal(run(weight, moment.double(), make_grid(4)), codes)


def test_a_row_changes_only_itself():
    weight, moment = make_problem(9, 140)
    before = run(weight, moment, make_grid(3))
    others = torch.arange(9) != 4
    for value in (0.0, 0.5, -0.5, 1e-30, 1e30):
        disturbed = weight.clone()
        disturbed[4] = value
        codes = run(disturbed, moment, make_grid(3))
        assert torch.equal(codes[others], before[others])
        if value == 0.0:
            assert (codes[4] == 0).all()


def test_dead_channels_are_rounded_to_nearest_and_harm_no_other():
    weight, moment = make_problem(8, 24)
    dead = torch.tensor([3, 17])
    alive = torch.tensor([j for j in range(24) if j not in dead])
    moment[dead] = 0
    moment[:, dead] = 0
    for order in ("activation", "natural"):
        codes = run(weight, moment, make_grid(3), order=order)
        assert torch.equal(codes[:, dead], nearest(weight, make_grid(3))[:, dead])
        scale, zero = choose_qparams(weight, grid=make_grid(3))
        alone = gptq_round(weight[:, alive], moment[alive][:, alive], scale=scale, zero_point=zero, grid=make_grid(3),
                           order=order)  # fmt: skip
        assert torch.equal(codes[:, alive], alone)
    assert torch.equal(run(weight, torch.zeros(24, 24), make_grid(3)), nearest(weight, make_grid(3)))


@settings(max_examples=60)
@given(
    st.integers(1, 6), st.integers(1, 20), st.integers(2, 8), st.sampled_from(KINDS), st.integers(0, 2**31),
    st.sampled_from([1e-30, 1e-3, 1.0, 1e4, 1e15]), st.integers(1, 30),
)  # fmt: skip
def test_never_worse_than_nearest_whatever_the_shape(rows, columns, bits, kind, seed, huge, samples):
    """Few samples make a singular moment; one channel of any size. 1e-5: sums in float32."""
    weight, moment = make_problem(rows, columns, seed, samples=samples)
    moment = moment.double()
    moment[0] *= huge
    moment[:, 0] *= huge
    grid = make_grid(bits, kind)
    codes = run(weight, moment, grid)
    assert codes.min() >= grid.qmin
    assert codes.max() <= grid.qmax
    plain = cost(nearest(weight, grid), weight, moment, grid)
    noise = 1e-5 * plain.abs() + 1e-12 * moment.diagonal().sum()
    assert (cost(codes, weight, moment, grid) <= plain + noise).all()


def test_a_moment_that_is_not_positive_definite_gets_more_damping():
    weight, moment = make_problem(4, 16)
    broken = moment - 0.1 * moment.diagonal().mean() * torch.eye(16)
    broken.diagonal().clamp_(min=0.01)
    assert torch.linalg.eigvalsh(broken)[0] < -0.02 * broken.diagonal().mean()
    grid = make_grid(4)
    assert (cost(run(weight, broken, grid), weight, broken, grid)
            <= cost(nearest(weight, grid), weight, broken, grid) + 1e-3).all()  # fmt: skip
    impossible = torch.eye(16) + 1e6 * (1 - torch.eye(16))
    with pytest.raises(ValueError, match="not positive definite with 1000"):
        run(weight, -impossible + 2 * torch.eye(16), grid)


def test_wrong_arguments():
    weight, moment = make_problem(4, 16)
    grid = make_grid(4)
    with pytest.raises(ValueError, match=r"\[15, 15\] does not fit in_features=16"):
        run(weight, moment[1:, 1:], grid)
    with pytest.raises(ValueError, match="damping=0.0"):
        run(weight, moment, grid, damping=0.0)
    with pytest.raises(ValueError, match="order='sideways'"):
        run(weight, moment, grid, order="sideways")
    for bad in (float("nan"), -1.0):
        broken = moment.clone()
        broken[3, 3] = bad
        with pytest.raises(ValueError, match="not finite or a negative"):
            run(weight, broken, grid)


def test_damping_and_inputs():
    """Endless damping is rounding to nearest; arguments stay as they are; a strided weight gives the same."""
    weight, moment = make_problem(6, 30)
    copies = weight.clone(), moment.clone()
    codes = run(weight, moment, make_grid(3))
    assert not torch.equal(codes, nearest(weight, make_grid(3)))
    assert torch.equal(run(weight, moment, make_grid(3), damping=1e9), nearest(weight, make_grid(3)))
    assert torch.equal(run(weight.mT.contiguous().mT, moment, make_grid(3)), codes)
    assert torch.equal(weight, copies[0])
    assert torch.equal(moment, copies[1])
