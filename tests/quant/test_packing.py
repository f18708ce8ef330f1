"""Canonical packing: golden bytes worked out by hand, exact round trips, refused inputs."""

import doctest

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from qvgen.quant import packing
from qvgen.quant.packing import pack_codes, plane_shapes, unpack_codes


def codes_of(*rows):
    return torch.tensor(rows, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("bits", "row", "planes"),
    [
        (2, [1, 2, 3, 0, 2, 3], ["39 0e"]),
        (2, [3], ["03"]),
        (3, [1, 2, 3, 4, 5, 6, 7, 0, 7], ["39 39 03", "78 01"]),
        (3, [4], ["00", "01"]),
        (4, [1, 2, 15, 0, 9], ["21 0f 09"]),
        (5, [0, 31, 17], ["00 1f 11"]),
        (6, [0, 63, 17], ["00 3f 11"]),
        (7, [0, 127, 17], ["00 7f 11"]),
        (8, [0, 255, 17], ["00 ff 11"]),
    ],
)
def test_golden_bytes(bits, row, planes):
    packed = pack_codes(codes_of(row, [0] * len(row)), bits=bits)
    assert [bytes(plane[0].tolist()).hex(" ") for plane in packed] == planes
    assert all(not plane[1].any() for plane in packed)
    assert all(plane.dtype == torch.uint8 and plane.is_contiguous() for plane in packed)
    assert unpack_codes(packed, bits=bits, in_features=len(row))[0].tolist() == row


@pytest.mark.parametrize("bits", range(2, 9))
def test_all_codes_in_all_positions_round_trip(bits):
    # row i starts with code i: every code meets every position of a byte
    count = 2**bits
    codes = ((torch.arange(count)[:, None] + torch.arange(count + 5)[None, :]) % count).to(torch.uint8)
    planes = pack_codes(codes, bits=bits)
    assert [tuple(plane.shape) for plane in planes] == list(
        plane_shapes(bits=bits, out_features=count, in_features=count + 5)
    )
    assert torch.equal(unpack_codes(planes, bits=bits, in_features=count + 5), codes)


@settings(max_examples=150, derandomize=True)
@given(st.integers(2, 8), st.integers(1, 6), st.integers(1, 70), st.integers(0, 2**20))
def test_round_trip(bits, rows, columns, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (rows, columns), generator=generator, dtype=torch.uint8)
    planes = pack_codes(codes, bits=bits)
    assert torch.equal(unpack_codes(planes, bits=bits, in_features=columns), codes)
    # every row is packed by itself, whatever its strides
    wide = torch.zeros(2 * rows, columns, dtype=torch.uint8)
    wide[::2] = codes
    for view in (codes.t().contiguous().t(), wide[::2]):
        assert all(torch.equal(a, b) for a, b in zip(pack_codes(view, bits=bits), planes, strict=True))
    strided = [plane.t().contiguous().t() for plane in planes]
    unpacked = unpack_codes(strided, bits=bits, in_features=columns)
    assert torch.equal(unpacked, codes)
    assert unpacked.is_contiguous()
    assert all(torch.equal(a[-1:], b) for a, b in zip(planes, pack_codes(codes[-1:], bits=bits), strict=True))


def test_bytes_per_weight():
    sizes = {bits: plane_shapes(bits=bits, out_features=1, in_features=64) for bits in range(2, 9)}
    total = {bits: sum(columns for _, columns in shapes) for bits, shapes in sizes.items()}
    assert total == {2: 16, 3: 24, 4: 32, 5: 64, 6: 64, 7: 64, 8: 64}


@pytest.mark.parametrize("bits", [4, 8])
def test_planes_share_no_memory(bits):
    codes = codes_of([1, 2, 3])
    planes = pack_codes(codes, bits=bits)
    unpacked = unpack_codes(planes, bits=bits, in_features=3)
    codes.zero_()
    planes[0].zero_()
    assert unpacked.tolist() == [[1, 2, 3]]


@pytest.mark.parametrize(
    ("codes", "bits", "message"),
    [
        (codes_of([1, 8]), 3, r"code 8 does not fit into 3 bits; codes must lie in 0\.\.7"),
        (codes_of([128]), 7, "code 128"),
        (torch.tensor([[1]]), 3, r"codes are torch\.int64"),
        (torch.tensor([[-1]], dtype=torch.int8), 3, r"codes are torch\.int8"),
        (codes_of([1])[0], 3, r"shape \[1\]"),
        (codes_of([]), 3, r"shape \[1, 0\]"),
        (codes_of([1]), 1, "bits=1"),
        (codes_of([1]), 9, "bits=9"),
        (codes_of([1]), True, "bits=True"),
    ],
)
def test_bad_codes_are_named(codes, bits, message):
    with pytest.raises(ValueError, match=message):
        pack_codes(codes, bits=bits)


@pytest.mark.parametrize(
    ("planes", "bits", "columns", "message"),
    [
        ([codes_of([0, 0])], 3, 5, "1 planes for 3-bit codes; pass 2"),
        ([codes_of([0, 0]), codes_of([0, 0])], 2, 5, "2 planes for 2-bit codes"),
        ([codes_of([0, 0])], 4, 5, r"plane has shape \[1, 2\]; .*in_features=5 need \[1, 3\]"),
        ([codes_of([0, 0]), codes_of([0], [0])], 3, 5, r"plane has shape \[2, 1\].* need \[1, 1\]"),
        ([torch.zeros(1, 2)], 4, 4, r"plane is torch\.float32"),
        ([codes_of([0, 0])[0]], 4, 4, r"plane is torch\.uint8 \[2\]"),
        ([codes_of([0, 16])], 4, 3, "padding after column 3 is not 0"),
        ([codes_of([0]), codes_of([32])], 3, 4, "padding after column 4 is not 0"),
        ([codes_of([0, 32])], 5, 2, "code 32 does not fit into 5 bits"),
        ([codes_of([0])], 4, 0, r"shape \[1, 0\] has no codes"),
    ],
)
def test_bad_planes_are_named(planes, bits, columns, message):
    with pytest.raises(ValueError, match=message):
        unpack_codes(planes, bits=bits, in_features=columns)


def test_docstring_examples():
    result = doctest.testmod(packing)
    assert result.attempted
    assert result.failed == 0
