"""The block Hadamard transform against Sylvester's and Paley's matrices in float64 (tests/hadamard_oracle.py)."""

import hashlib

import numpy as np
import pytest
import torch

from qvgen.quant.hadamard import hadamard_order, hadamard_transform, nearest_sizes, paley_matrix
from tests import hadamard_oracle

WIDTHS = {
    **dict.fromkeys((16, 32, 64, 128, 256, 512, 2048, 4096, 8192, 16384), 1),
    **dict.fromkeys((24, 48, 96, 1536, 3072, 12288), 12),
    **{1152: 36, 1920: 60, 5120: 20, 7680: 60, 8960: 140, 13824: 108, 14336: 28},
}
"""in_features of the models, and the b of each whole row."""


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("block", "columns"),
    [
        (1, 3),
        (2, 6),
        (4, 4),
        (16, 48),
        (64, 128),
        (256, 512),
        (12, 36),
        (28, 28),
        (48, 96),
        (120, 120),
        (216, 216),
        (560, 560),
    ],
)
def test_it_is_the_block_matrix(block, columns):
    x = draw(7, columns)
    expected = x.double() @ torch.from_numpy(hadamard_oracle.rotation_matrix(columns, block))
    got = hadamard_transform(x, block_size=block)
    # log2(n) + 1 roundings, and b / 4 + 1 of Paley's part, of numbers no larger than the sum of the row's magnitudes
    # over sqrt(block).
    order = hadamard_order(block)
    roundings = (block // order).bit_length() + (order // 4 + 1 if order > 1 else 0)
    size = x.double().abs().unflatten(-1, (-1, block)).sum(-1, keepdim=True) / block**0.5
    error = (got.double() - expected).abs().unflatten(-1, (-1, block))
    assert (error <= 2.0**-24 * (roundings + 1) * size).all()


def test_golden_values():
    """1 2 3 4 -> strides 1: 3 -1 7 -1; stride 2: 10 -2 -4 0; halved."""
    assert hadamard_transform(torch.tensor([1.0, 2.0, 3.0, 4.0]), block_size=4).tolist() == [5.0, -1.0, -2.0, 0.0]


def test_it_is_its_own_inverse_and_keeps_products():
    x, weight = draw(5, 128, seed=1), draw(6, 128, seed=2)
    rotated = hadamard_transform(x, block_size=64)
    torch.testing.assert_close(hadamard_transform(rotated, block_size=64), x, rtol=0, atol=2e-6)  # 14 roundings of ~1
    product = rotated.double() @ hadamard_transform(weight, block_size=64).double().T
    # 128 products of entries of size 1, each off by 7 roundings of 2^-24 on either side: 1e-4 even if all align.
    torch.testing.assert_close(product, x.double() @ weight.double().T, rtol=0, atol=1e-4)


def test_a_row_does_not_depend_on_its_batch():
    x = draw(9, 128, seed=3)
    rotated = hadamard_transform(x, block_size=64)
    assert torch.equal(rotated, torch.cat([hadamard_transform(row[None], block_size=64) for row in x]))
    assert torch.equal(rotated, hadamard_transform(x.reshape(3, 3, 128), block_size=64).reshape(9, 128))
    x[4] = float("inf")
    others = torch.arange(9) != 4
    assert torch.equal(rotated[others], hadamard_transform(x, block_size=64)[others])
    x[4] = 0.0
    assert (hadamard_transform(x, block_size=64)[4] == 0).all()


def test_an_outlier_is_spread_over_its_block_alone():
    x = torch.zeros(1, 128)
    x[0, 70] = 8.0
    rotated = hadamard_transform(x, block_size=64)
    assert (rotated[0, :64] == 0).all()
    assert (rotated[0, 64:].abs() == 1).all()


def test_it_computes_in_float32_and_writes_nothing():
    x = draw(3, 64)
    copy = x.clone()
    assert hadamard_transform(x.bfloat16(), block_size=16).dtype == torch.float32
    half = x.bfloat16()
    assert torch.equal(hadamard_transform(half, block_size=16), hadamard_transform(half.float(), block_size=16))
    strided = x.t().contiguous().t()
    assert torch.equal(hadamard_transform(strided, block_size=16), hadamard_transform(x, block_size=16))
    assert torch.equal(x, copy)


def test_gradients_are_the_transform_of_gradients():
    x = draw(2, 32).requires_grad_()
    grad = draw(2, 32, seed=5)
    hadamard_transform(x, block_size=32).backward(grad)
    torch.testing.assert_close(x.grad, hadamard_transform(grad, block_size=32), rtol=0, atol=1e-6)  # 6 roundings


def test_gradients_of_a_paley_block_are_those_of_the_matrix():
    x = draw(2, 120, seed=6).requires_grad_()
    grad = draw(2, 120, seed=7)
    hadamard_transform(x, block_size=60).backward(grad)
    expected = grad.double() @ torch.from_numpy(hadamard_oracle.rotation_matrix(120, 60)).T
    torch.testing.assert_close(x.grad.double(), expected, rtol=0, atol=2e-6)  # 19 roundings of about 1, uncorrelated
    half = x.detach().bfloat16().requires_grad_()
    hadamard_transform(half, block_size=60).backward(grad)
    assert torch.equal(half.grad, x.grad.bfloat16())


# --------------------------------------------------------------------------- Paley's sizes

ORDERS = [b for b in range(4, 301, 4) if hadamard_order(b) == b and b > 8]


def test_every_order_up_to_300_is_paleys_matrix_exactly():
    """Symmetric, and H H = b I in integers; equal to the textbook form of the oracle."""
    assert ORDERS[:8] == [12, 20, 28, 36, 44, 60, 68, 76]
    assert {84, 108, 124, 140, 148} < set(ORDERS)
    for order in [1, *ORDERS]:
        matrix = np.array(paley_matrix(order))
        assert (matrix == matrix.T).all()
        assert (matrix @ matrix == order * np.eye(order, dtype=int)).all()
        assert order == 1 or (matrix == hadamard_oracle.paley_matrix(order)).all()


def test_a_size_takes_the_smallest_order_that_exists():
    for size in range(1, 700):
        factors = hadamard_oracle.hadamard_factors(size)
        assert hadamard_order(size) == (factors and len(factors[0]))
    missing = [size for size in range(4, 200, 4) if hadamard_order(size) is None]
    assert missing == [52, 92, 100, 116, 156, 172, 184, 188]


@pytest.mark.parametrize(("columns", "order"), WIDTHS.items())
def test_whole_rows_of_every_width(columns, order):
    """Against the float64 factors, and back: a float32 rounding is 6e-8, and 14 + 35 of them do not align."""
    assert hadamard_order(columns) == order
    x = draw(3, columns, seed=columns)
    rotated = hadamard_transform(x, block_size=columns)
    exact = torch.from_numpy(hadamard_oracle.rotate(x.numpy(), columns))
    assert (rotated.double() - exact).norm() <= 1e-6 * exact.norm()
    back = hadamard_transform(rotated, block_size=columns)
    assert (back - x).norm() <= 1e-5 * x.norm()
    assert (back - x).norm() <= 1e-6 * x.norm()


@pytest.mark.parametrize("columns", [1152, 1920, 3072, 5120])
def test_a_unit_vector_becomes_a_row_of_the_kronecker_product(columns):
    """H_b kron H_n: entry (i, k) of row (j, l) is H_b[i,j] H_n[k,l], all of magnitude 1 / sqrt(K)."""
    order = hadamard_order(columns)
    size = columns // order
    sylvester = hadamard_oracle.hadamard_matrix(size) * size**0.5
    for j, k in ((0, 0), (1, size - 1), (order - 1, 3), (order // 2, 7)):
        x = torch.zeros(columns)
        x[j * size + k] = 1.0
        expected = np.kron(hadamard_oracle.paley_matrix(order)[j], sylvester[k]) * np.float32(columns**-0.5)
        assert hadamard_transform(x, block_size=columns).double().tolist() == expected.tolist()


def test_a_long_batch_is_cut_where_it_does_not_matter():
    """More rows than are transformed at a time, whatever the last piece's length; a row alone is its own piece."""
    x = draw(1100, 240, seed=8)
    x[::7] *= 1e20
    x[5] = float("nan")
    rotated = hadamard_transform(x, block_size=240)
    assert rotated[5].isnan().all()
    for rows, last in ((1, 60), (3, 60), (1092, 1100), (1093, 1100)):  # short pieces of some rows
        pieces = torch.cat([hadamard_transform(piece, block_size=240) for piece in x[:last].split(rows)])
        assert torch.equal(pieces.nan_to_num(), rotated[:last].nan_to_num())
    assert hadamard_transform(x[:0], block_size=240).shape == (0, 240)


GOLDEN = {2: "1875df3820917dee", 16: "7d2591917c2a9d97", 64: "47a450fafdb13720", 256: "52006b522de6a4ee"}
GOLDEN |= {1024: "d435e8da098280e9"}
"""sha256 of the results of the version that knew powers of two only."""


@pytest.mark.parametrize("block", GOLDEN)
def test_powers_of_two_keep_their_bits(block):
    rows = [[(7919 * i + 31 * r) % 10007 / 97 - 51.5 for i in range(2 * block)] for r in range(3)]
    rotated = hadamard_transform(torch.tensor(rows), block_size=block)
    assert hashlib.sha256(rotated.numpy().tobytes()).hexdigest()[:16] == GOLDEN[block]


# --------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("block", "columns", "fitting"),
    [(0, 96, "2"), (-2, 96, "2"), (3, 96, "2 or 4"), (52, 1040, "40 or 80"), (100, 1600, "80 or 160"), (9, 27, "1")],
)
def test_sizes_without_a_matrix_are_refused(block, columns, fitting):
    with pytest.raises(ValueError, match=f"block_size={block} has no Hadamard matrix here; use {fitting}$"):
        hadamard_transform(torch.zeros(1, columns), block_size=block)


def test_blocks_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="block_size=64 does not divide 96 columns; use 48 or 96$"):
        hadamard_transform(torch.zeros(1, 96), block_size=64)


def test_nearest_sizes():
    assert nearest_sizes(52) == [48, 56]
    assert nearest_sizes(1) == nearest_sizes(-4) == [2]
    assert nearest_sizes(64, columns=1920) == [60, 80]
    assert nearest_sizes(4096, columns=1920) == [1920]
    assert nearest_sizes(3, columns=7) == []
