"""The package's own Hadamard transform: the contract's order of operations to the bit (oracle.py), and training's."""

import numpy as np
import pytest
import torch

from qvgen.quant.hadamard import hadamard_order, hadamard_transform, paley_matrix
from qvgen_kernels.hadamard import block_hadamard, has_matrix, paley_factor, paley_signs, rotation_sizes
from tests import hadamard_oracle
from tests.kernels import oracle
from tests.kernels.layer import as64, make_rows

WIDTHS = (64, 256, 512, 1152, 1536, 1920, 2048, 3072, 4096, 5120, 7680, 8192, 8960, 12288, 13824, 14336, 16384)
"""in_features of the models; each can be rotated as one block."""


@pytest.mark.parametrize(
    ("columns", "block"),
    [(128, 16), (24, 12), (20, 20), (56, 28), (144, 72), (240, 240), (216, 216), (560, 280), (1920, 1920)],
)
def test_both_sides_follow_the_contract(columns, block):
    x = make_rows(3, columns)
    expected = [oracle.hadamard(row, block) for row in as64(x)]
    np.testing.assert_array_equal(as64(block_hadamard(x, block=block)), expected)
    np.testing.assert_array_equal(as64(hadamard_transform(x, block_size=block)), expected)


@pytest.mark.parametrize(("columns", "block"), [(20, 4), (48, 16), (1920, 64), (1536, 256), (1024, 1024)])
def test_the_regular_kind_is_the_product_with_its_matrix(columns, block):
    x = make_rows(3, columns)
    rotated = block_hadamard(x, block=block, kind="regular")
    np.testing.assert_array_equal(as64(rotated), [oracle.hadamard(row, block, "regular") for row in as64(x)])
    matrix = hadamard_oracle.regular_matrix(block)
    assert (matrix == matrix.T).all()
    np.testing.assert_array_equal(matrix @ matrix, np.eye(block))
    exact = (as64(x).reshape(3, -1, block) @ matrix).reshape(3, columns)
    assert (np.linalg.norm(as64(rotated) - exact, axis=1) <= 1e-6 * np.linalg.norm(as64(x), axis=1)).all()
    # Every row of the matrix has the sum 1: equal numbers stay equal, where Sylvester's matrix makes them one spike.
    np.testing.assert_array_equal(as64(block_hadamard(torch.ones(1, block), block=block, kind="regular")), 1.0)
    sylvester = as64(block_hadamard(x, block=block))
    assert not np.allclose(sylvester, as64(rotated))


def test_regular_sizes_are_powers_of_four():
    assert rotation_sizes(1024, "regular") == [4, 16, 64, 256, 1024]
    assert rotation_sizes(1920, "regular") == [4, 16, 64]
    assert not any(has_matrix(size, "regular") for size in (0, 1, 2, 8, 12, 32, 128, 1920))


@pytest.mark.parametrize("columns", WIDTHS)
def test_every_width_is_rotated_as_in_training(columns):
    x = make_rows(5, columns, seed=columns)
    for block in {columns, 64}:
        rotated = block_hadamard(x, block=block)
        assert torch.equal(rotated, hadamard_transform(x, block_size=block))
    whole = block_hadamard(x, block=columns)
    assert (block_hadamard(whole, block=columns) - x).norm() <= 1e-6 * x.norm()
    # make_rows differ by 10^6 in size: row by row
    error = np.linalg.norm(as64(whole) - hadamard_oracle.rotate(x.numpy(), columns), axis=1)
    assert (error <= 1e-6 * np.linalg.norm(as64(x), axis=1)).all()


def test_the_construction_is_that_of_training():
    for size in range(1, 4097):
        assert paley_factor(size) == (hadamard_order(size) or 0)
    for order in [b for b in range(12, 301, 4) if paley_factor(b) == b]:
        signs = np.array(paley_signs(order))
        assert (signs @ signs.T == order * np.eye(order, dtype=int)).all()
        assert signs.tolist() == paley_matrix(order)
    assert paley_factor(0) == paley_factor(-4) == paley_factor(52) == 0
    assert rotation_sizes(60) == [2, 4, 12, 20, 60]


def test_a_row_is_the_same_alone_in_a_long_batch_and_with_any_number_of_threads():
    x = make_rows(1100, 240, seed=1)
    threads = torch.get_num_threads()
    results, alone = [], []
    some = range(0, len(x), 9)
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            results += [block_hadamard(x, block=240), hadamard_transform(x, block_size=240)]
            alone.append(torch.cat([block_hadamard(x[row : row + 1], block=240) for row in some]))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0], other) for other in results)
    assert all(torch.equal(results[0][some], other) for other in alone)
    assert block_hadamard(x[:0], block=240).shape == (0, 240)
    assert torch.equal(block_hadamard(x.view(11, 100, 240), block=240).view(1100, 240), results[0])
