"""Randomized and re-factored singular value decompositions against dense ones in float64 (numpy)."""

import numpy as np
import pytest
import torch

from qvgen.lowrank.svd import refactor, truncated_svd
from tests import oracles


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def rounding_residual(rows, columns, *, seed=0):
    """What rounding to 3 bits leaves: the flat spectrum that Phi meets."""
    weight = draw(rows, columns, seed=seed)
    scale = weight.abs().amax(1, keepdim=True) / 3
    return weight - scale * (weight / scale).round()


def check_singular_factors(left, right):
    """Columns of falling size, orthogonal, evenly split, signs fixed. Float32 factors: 1e-6 of the largest."""
    gram_left, gram_right = left.double().T @ left.double(), right.double() @ right.double().T
    values = gram_left.diagonal()
    assert (values.diff() <= 1e-6 * values[0]).all()
    tolerance = 4e-6 * values[0].item()  # K terms of 2^-24 each, correlated at worst by sqrt(K)
    torch.testing.assert_close(gram_left, torch.diag(values), rtol=0, atol=tolerance)
    torch.testing.assert_close(gram_right, torch.diag(values), rtol=0, atol=tolerance)
    columns = left[:, left.abs().amax(0) > 0]
    assert (columns.gather(0, columns.abs().argmax(0, keepdim=True)) > 0).all()


@pytest.mark.parametrize(("rows", "columns", "rank"), [(96, 128, 8), (128, 96, 32), (300, 120, 16), (40, 40, 1)])
def test_the_error_is_within_one_percent_of_the_best(rows, columns, rank):
    residual = rounding_residual(rows, columns)
    left, right = truncated_svd(residual, rank=rank, generator=generator())
    assert left.dtype == right.dtype == torch.float32
    assert (left.shape, right.shape) == ((rows, rank), (rank, columns))
    error = (residual.double() - left.double() @ right.double()).square().sum().item()
    best = oracles.best_rank_error(residual.double().numpy(), rank)
    assert best * (1 - 1e-6) <= error <= 1.01 * best
    check_singular_factors(left, right)


@pytest.mark.parametrize(("rows", "columns", "rank"), [(24, 40, 8), (40, 24, 24), (16, 16, 16), (1, 5, 1)])
def test_it_is_exact_where_the_sample_reaches_the_width(rows, columns, rank):
    matrix = draw(rows, columns, seed=1)
    left, right = truncated_svd(matrix, rank=rank, generator=generator())
    best = oracles.best_rank_error(matrix.double().numpy(), rank)
    error = (matrix.double() - left.double() @ right.double()).square().sum().item()
    # The cast of the factors to float32: 2^-24 relative each, far below this share of the matrix.
    assert abs(error - best) <= 1e-6 * matrix.double().square().sum().item()
    check_singular_factors(left, right)


def test_a_matrix_of_low_rank_is_found_exactly():
    matrix = draw(100, 4, seed=2) @ draw(4, 80, seed=3)
    left, right = truncated_svd(matrix, rank=4, generator=generator())
    torch.testing.assert_close(left @ right, matrix, rtol=0, atol=1e-5)  # entries of about 2, float32 products
    left, right = truncated_svd(torch.zeros(100, 80), rank=4, generator=generator())
    assert (left @ right == 0).all()
    assert left.isfinite().all()
    assert right.isfinite().all()


def test_the_generator_alone_decides():
    residual = rounding_residual(96, 128)
    first = truncated_svd(residual, rank=8, generator=generator(5))
    again = truncated_svd(residual, rank=8, generator=generator(5))
    other = truncated_svd(residual, rank=8, generator=generator(6))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])


@pytest.mark.parametrize("rank", [0, -1, 11])
def test_ranks_outside_are_refused(rank):
    with pytest.raises(ValueError, match=rf"rank={rank} is outside 1..10 for a weight of shape \[20, 10\]"):
        truncated_svd(torch.zeros(20, 10), rank=rank, generator=generator())
    with pytest.raises(ValueError, match=f"rank={rank} is outside 1..10"):
        refactor(torch.zeros(20, 10), torch.zeros(10, 30), rank=rank)


@pytest.mark.parametrize("kept", [1, 3, 4])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
def test_refactor_keeps_the_product(kept, scale):
    left, right = draw(64, 8, seed=4) * scale, draw(8, 96, seed=5)
    left[:, kept:] = 0.0  # what the gate does
    new_left, new_right = refactor(left, right, rank=kept)
    assert (new_left.shape, new_right.shape) == ((64, kept), (kept, 96))
    product = left.double() @ right.double()
    error = (new_left.double() @ new_right.double() - product).norm() / product.norm()
    assert error <= 1e-6  # the bound; the cast to float32 gives about 6e-8
    check_singular_factors(new_left / scale**0.5, new_right / scale**0.5)


def test_refactor_keeps_the_largest_components():
    """Truncation below the rank is the best approximation of the product, by its dense spectrum."""
    left, right = draw(50, 6, seed=6), draw(6, 40, seed=7)
    product = (left.double() @ right.double()).numpy()
    new_left, new_right = refactor(left, right, rank=2)
    error = np.square(product - (new_left.double() @ new_right.double()).numpy()).sum()
    assert error == pytest.approx(oracles.best_rank_error(product, 2), rel=1e-5)  # float32 factors
    values = np.linalg.svd(product, compute_uv=False)[:2]
    assert new_left.double().square().sum(0).tolist() == pytest.approx(values.tolist(), rel=1e-6)


def test_refactor_is_a_fixed_point_and_keeps_zeros():
    left, right = refactor(draw(30, 5, seed=8), draw(5, 20, seed=9), rank=5)
    again = refactor(left, right, rank=5)
    torch.testing.assert_close(again[0], left, rtol=0, atol=1e-5)  # separated singular values: vectors move 1e-7 / gap
    torch.testing.assert_close(again[1], right, rtol=0, atol=1e-5)
    for factor in refactor(torch.zeros(30, 5), draw(5, 20), rank=3):
        assert factor.isfinite().all()
    zero_left, zero_right = refactor(torch.zeros(30, 5), draw(5, 20), rank=3)
    assert (zero_left @ zero_right == 0).all()
