"""The range search against a float64 oracle that tries all 80 candidates of every row in a plain loop."""

import numpy as np
import pytest
import torch

from qvgen.quant import ranges
from qvgen.quant.affine import choose_qparams, clipped_range, fake_quantize, qparams_from_range
from qvgen.quant.grid import Grid
from qvgen.quant.ranges import EXPONENT, NUM_CANDIDATES, search_qparams
from qvgen_kernels.cpu_library import missing_reason
from tests import oracles

KINDS = ("integer", "real", "none")


def make_grid(bits, kind="integer", group=None, scale_dtype="float32"):
    granularity = "per_group" if group else "per_channel"
    return Grid(bits=bits, granularity=granularity, zero_point=kind, group_size=group, scale_dtype=scale_dtype)


def make_weight(rows=6, columns=32, seed=0):
    """Rows with heavy tails, where a shorter range pays."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * 0.1
    return weight * (1 + 6 * (torch.rand(rows, columns, generator=generator) > 0.93))


def row_errors(weight, scale, zero_point, grid):
    values = fake_quantize(weight, scale=scale, zero_point=zero_point, grid=grid)
    return (values.double() - weight).abs().pow(EXPONENT).unflatten(-1, (scale.shape[1], -1)).sum(-1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("group", [None, 16])
def test_it_finds_the_best_of_all_candidates(kind, group):
    """Its error is the oracle's least error: 1e-4 relative, the float32 sum and a code or two at a tie."""
    weight = make_weight()
    shorter = 0
    for bits in (2, 3, 4, 8):
        grid = make_grid(bits, kind, group)
        scale, zero = search_qparams(weight, grid=grid)
        errors = row_errors(weight, scale, zero, grid)
        size = group or weight.shape[1]
        for n, row in enumerate(weight.double().numpy()):
            for g in range(0, len(row), size):
                part = row[g : g + size]
                options = {"bits": bits, "kind": kind}
                best = np.inf
                for index in range(80):
                    shrink = 1 - index / 100
                    s, z = oracles.choose_qparams(part, clip_low=shrink, clip_high=shrink, **options)
                    best = min(best, oracles.search_error(part, s, z, **options))
                assert errors[n, g // size].item() <= best * (1 + 1e-4)
        shorter += int((scale < choose_qparams(weight, grid=grid)[0]).sum())
    assert NUM_CANDIDATES == 80
    assert EXPONENT == 2.4
    assert shorter  # the search did not just keep the minimum and maximum


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale_dtype", ["float32", "bfloat16", "float16"])
def test_never_worse_than_the_plain_range(kind, scale_dtype):
    weight = make_weight(rows=20, seed=1)
    for bits in range(2, 9):
        grid = make_grid(bits, kind, scale_dtype=scale_dtype)
        plain = row_errors(weight, *choose_qparams(weight, grid=grid), grid)
        # Errors are summed in float32: 32 terms.
        assert (row_errors(weight, *search_qparams(weight, grid=grid), grid) <= plain * (1 + 32 * 2.0**-24)).all()


def test_golden_row():
    """0, 2 (twenty times), 10 on 2 bits: 2 becomes s and 10 becomes 3 s, an error of 20 |s - 2|^2.4 + (10 - 3 s)^2.4.

    s = 10 p / 3. At p = 1: 20 * 1.99 = 39.9; at p = 0.6: (10 - 6)^2.4 = 27.9; the least is at p = 0.77, 12.50.
    """
    weight = torch.tensor([[0.0] + [2.0] * 20 + [10.0]])
    scale, zero = search_qparams(weight, grid=make_grid(2))
    assert scale.item() == pytest.approx(7.7 / 3, rel=1e-6)  # float32
    assert zero.item() == 0
    assert row_errors(weight, scale, zero, make_grid(2)).item() == pytest.approx(12.50, abs=0.005)


def test_equal_errors_keep_the_widest_range():
    """A row that every candidate represents exactly, or equally badly, keeps its minimum and maximum.

    The errors of the huge row are all infinite: |1e30|^2.4 is no float32.
    """
    weight = torch.stack([torch.zeros(8), torch.full((8,), 1e-30), make_weight(rows=1, columns=8)[0] * 1e31])
    grid = make_grid(3)
    for got, plain in zip(search_qparams(weight, grid=grid), choose_qparams(weight, grid=grid), strict=True):
        assert torch.equal(got, plain)


@pytest.mark.parametrize("kind", KINDS)
def test_special_rows_are_finite_and_change_no_other(kind):
    weight = make_weight()
    for bits in (2, 4, 8):
        grid = make_grid(bits, kind)
        before = search_qparams(weight, grid=grid)
        others = torch.arange(len(weight)) != 3
        for value in (0.0, 0.5, -0.5, 1e-30, 1e30):
            disturbed = weight.clone()
            disturbed[3] = value
            after = search_qparams(disturbed, grid=grid)
            for old, new in zip(before, after, strict=True):
                assert new.isfinite().all()
                assert torch.equal(old[others], new[others])
            assert (after[0] > 0).all()
            assert fake_quantize(disturbed, scale=after[0], zero_point=after[1], grid=grid).isfinite().all()


def test_shapes_types_and_an_untouched_input():
    weight = make_weight()
    copy = weight.clone()
    assert [value.shape for value in search_qparams(weight, grid=make_grid(4))] == [(6, 1)] * 2
    assert [value.shape for value in search_qparams(weight, grid=make_grid(4, group=8))] == [(6, 4)] * 2
    assert torch.equal(weight, copy)
    half = weight.bfloat16()
    for got, expected in zip(
        search_qparams(half, grid=make_grid(4)), search_qparams(half.float(), grid=make_grid(4)), strict=True
    ):
        assert torch.equal(got, expected)
        assert got.dtype == torch.float32
    strided = weight.t().contiguous().t()
    assert torch.equal(search_qparams(strided, grid=make_grid(4))[0], search_qparams(weight, grid=make_grid(4))[0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("group", [None, 64])
@pytest.mark.parametrize("way", ["compare_few", "walk"])
def test_leaving_hopeless_candidates_out_changes_no_bit(kind, bits, group, way, monkeypatch):
    """Against all 80, with the kernels' approximate errors and without; and some are left out, or it would say nothing."""
    if way == "walk":
        monkeypatch.setattr(ranges, "refusal", lambda rows: "no compiler")
    elif missing_reason() is not None:
        pytest.skip(missing_reason())
    grid = make_grid(bits, kind, group)
    weight = torch.cat([make_weight(40, 256), torch.randn(40, 256, generator=torch.Generator().manual_seed(1))])
    weight[3] = 0
    weight[4] = 1e20
    weight[5, 1:] = 0
    weight[6] *= 1e-13
    weight[7, 3] = torch.nan
    found = search_qparams(weight, grid=grid)
    rows = weight.reshape(-1, group or 256)
    low, high = clipped_range(rows, grid=grid)
    best = torch.full((len(rows), 1), torch.inf)
    expected = list(qparams_from_range(low, high, grid))
    for index in range(NUM_CANDIDATES):
        pair = qparams_from_range(low * (1 - index / 100), high * (1 - index / 100), grid)
        error = ranges._errors(rows, *pair, grid)
        for side in (0, 1):
            expected[side] = torch.where(error < best, pair[side], expected[side])
        best = torch.minimum(best, error)
    for side in (0, 1):
        torch.testing.assert_close(found[side].reshape(-1, 1), expected[side], rtol=0, atol=0, equal_nan=True)

    whole = []
    plain = ranges._errors

    def counted(part, *rest):
        whole.append(len(part) if part.shape[-1] == (group or 256) else 0)
        return plain(part, *rest)

    monkeypatch.setattr(ranges, "_errors", counted)
    search_qparams(weight[10:14], grid=grid)
    if bits > 2:
        assert sum(whole) < NUM_CANDIDATES * 4 * (256 // (group or 256)) * (0.2 if way == "compare_few" else 1)


@pytest.mark.parametrize("group", [None, 16])
def test_rows_that_do_not_contain_zero_are_searched_on_their_own_range(group):
    """With a real zero point; both ways of searching choose the same bits, and lose a fraction of what they lost."""
    weight = make_weight(rows=9) + torch.tensor([3.0, -3.0, 500.0])[:, None].repeat(3, 1)
    for bits in (2, 4, 8):
        grid, whole = make_grid(bits, "real", group), make_grid(bits, "integer", group)
        scale, zero = search_qparams(weight, grid=grid)
        rows = weight.reshape(-1, group or weight.shape[1])
        walked = ranges._walk(rows, *clipped_range(rows, grid=grid), grid)
        assert torch.equal(scale.reshape(-1, 1), walked[0])
        assert torch.equal(zero.reshape(-1, 1), walked[1])
        before = row_errors(weight, *search_qparams(weight, grid=whole), whole)
        after = row_errors(weight, scale, zero, grid)
        assert (after < before).all()
        assert after.sum() < 0.2 * before.sum()
