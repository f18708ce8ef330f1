"""The block Hadamard transform against Sylvester's matrix in float64."""

import pytest
import torch

from qvgen.quant.hadamard import hadamard_transform
from tests import oracles


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("block", "columns"), [(1, 3), (2, 6), (4, 4), (16, 48), (64, 128), (256, 512)])
def test_it_is_the_block_matrix(block, columns):
    x = draw(7, columns)
    expected = x.double() @ torch.from_numpy(oracles.rotation_matrix(columns, block))
    got = hadamard_transform(x, block_size=block)
    # log2(block) + 1 roundings of numbers no larger than the sum of the row's magnitudes over sqrt(block).
    size = x.double().abs().unflatten(-1, (-1, block)).sum(-1, keepdim=True) / block**0.5
    error = (got.double() - expected).abs().unflatten(-1, (-1, block))
    assert (error <= 2.0**-24 * (block.bit_length() + 1) * size).all()


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


@pytest.mark.parametrize("block", [0, -2, 3, 48])
def test_blocks_that_are_no_power_of_two_are_refused(block):
    with pytest.raises(ValueError, match=f"block_size={block} is no power of two; use 16"):
        hadamard_transform(torch.zeros(1, 96), block_size=block)


def test_blocks_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="block_size=64 does not divide 96 columns"):
        hadamard_transform(torch.zeros(1, 96), block_size=64)
