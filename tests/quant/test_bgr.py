"""Bounded-init grid refinement against a loop over rows in float64 (the start is the oracle's own search)."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qvgen.quant.affine import choose_qparams, fake_quantize, quantize
from qvgen.quant.bgr import START_RATIOS, refine_grid
from qvgen.quant.grid import Grid
from qvgen.quant.ranges import search_qparams
from tests import oracles, oracles_ptq

KINDS = ("integer", "real", "none")


def make_grid(bits, kind="integer", group=None, scale_dtype="float32"):
    granularity = "per_group" if group else "per_channel"
    return Grid(bits=bits, granularity=granularity, zero_point=kind, group_size=group, scale_dtype=scale_dtype)


def make_weight(rows=6, columns=64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * 0.1
    return weight * (1 + 6 * (torch.rand(rows, columns, generator=generator) > 0.97))


def squared_error(weight, scale, zero, grid):
    values = fake_quantize(weight, scale=scale, zero_point=zero, grid=grid)
    return (values - weight).double().square().unflatten(-1, (scale.shape[1], -1)).sum(-1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("group", [None, 32])
def test_it_is_the_plain_loop(kind, group):
    """Errors within 1e-3 at the end (a flipped code at a tie takes another way down), 1e-5 at the start (float32)."""
    weight = make_weight()
    for bits in (2, 3, 4):
        found = refine_grid(weight, grid=make_grid(bits, kind, group))
        size = group or weight.shape[1]
        same = 0
        for n, row in enumerate(weight.double().numpy()):
            for g in range(len(row) // size):
                part, options = row[g * size : (g + 1) * size], {"bits": bits, "kind": kind}
                starts = [oracles.choose_qparams(part, clip_low=r, clip_high=r, **options) for r in START_RATIOS]
                runs = [oracles_ptq.refine_grid(part, *start, iterations=30, **options) for start in starts]
                scale, _, codes, errors = min(runs, key=lambda run: run[3][0])
                assert found.errors[0, n, g].item() == pytest.approx(errors[0], rel=1e-5)
                assert found.errors[-1, n, g].item() == pytest.approx(errors[-1], rel=2e-2)
                mine = found.codes[n, g * size : (g + 1) * size].numpy()
                same += np.array_equal(mine, codes) and found.scale[n, g].item() == pytest.approx(scale, rel=1e-5)
        assert same >= 0.8 * found.scale.numel()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale_dtype", ["float32", "bfloat16", "float16"])
def test_errors_fall_and_are_those_of_the_grid(kind, scale_dtype):
    weight = make_weight(rows=20, seed=1)
    for bits in range(2, 9):
        for group in (None, 16):
            grid = make_grid(bits, kind, group, scale_dtype)
            found = refine_grid(weight, grid=grid)
            assert (found.errors.diff(dim=0) <= 0).all()
            assert torch.equal(found.codes, quantize(weight, scale=found.scale, zero_point=found.zero_point, grid=grid))
            # 1e-6: squares in float32.
            last = squared_error(weight, found.scale, found.zero_point, grid)
            torch.testing.assert_close(found.errors[-1], last, rtol=1e-6, atol=0)
            assert (last <= squared_error(weight, *choose_qparams(weight, grid=grid), grid) * (1 + 1e-6)).all()
            assert torch.equal(found.scale.to(grid.torch_scale_dtype).float(), found.scale)
            whole = found.zero_point.round() == found.zero_point
            assert whole.all() if kind != "real" else not whole.all()


@pytest.mark.parametrize("kind", KINDS)
def test_it_beats_the_range_search(kind):
    """By its own measure, over all rows, at 2 to 4 bits."""
    weight = make_weight(rows=20, columns=256)
    for bits in (2, 3, 4):
        grid = make_grid(bits, kind)
        searched = squared_error(weight, *search_qparams(weight, grid=grid), grid).sum()
        assert refine_grid(weight, grid=grid).errors[-1].sum() < 0.99 * searched


@pytest.mark.parametrize("kind", KINDS)
def test_special_rows_are_finite_and_change_no_other(kind):
    weight = make_weight()
    others = torch.arange(len(weight)) != 3
    for bits in (2, 4, 8):
        grid = make_grid(bits, kind)
        before = refine_grid(weight, grid=grid)
        for value in (0.0, 0.5, -0.5, 1e-30, 1e30):
            disturbed = weight.clone()
            disturbed[3] = value
            disturbed[3, 0] *= -2 * (value == 1e30)
            after = refine_grid(disturbed, grid=grid)
            for name in ("scale", "zero_point", "codes"):
                assert torch.equal(getattr(after, name)[others], getattr(before, name)[others])
            assert after.scale.isfinite().all()
            assert (after.scale > 0).all()
            free = kind == "real" and value in (0.5, -0.5, 1e-30)  # the row does not contain 0
            inside = (after.zero_point >= 0) & (after.zero_point <= grid.qmax)
            assert inside[others if free else slice(None)].all()
            if free:
                assert after.zero_point[3].abs() <= 2.0**17
            if value == 0.0 and kind != "real":
                assert after.errors[-1, 3] == 0


@settings(max_examples=80)
@given(
    hnp.arrays(np.float32, hnp.array_shapes(min_dims=2, max_dims=2, max_side=9),
               elements=st.floats(-(2.0**50), 2.0**50, width=32)),
    st.integers(2, 8), st.sampled_from(KINDS),
)  # fmt: skip
def test_any_weight(values, bits, kind):
    grid, weight = make_grid(bits, kind), torch.from_numpy(values)
    found = refine_grid(weight, grid=grid)
    assert found.codes.shape == weight.shape
    assert found.scale.shape == found.zero_point.shape == (len(weight), 1)
    assert found.scale.isfinite().all()
    assert (found.scale > 0).all()
    contains = (weight.amin(-1) <= 0) & (weight.amax(-1) >= 0) if kind == "real" else slice(None)
    inside = (found.zero_point >= 0) & (found.zero_point <= grid.qmax)
    assert inside[contains].all()
    assert (found.zero_point.abs() <= 2.0**17).all()
    assert (found.errors.diff(dim=0) <= 0).all()
    assert torch.equal(found.codes, quantize(weight, scale=found.scale, zero_point=found.zero_point, grid=grid))


def test_more_rows_than_a_chunk_and_other_dtypes():
    weight = make_weight(rows=18, columns=16384).bfloat16()  # 16 rows a chunk
    found, alone = refine_grid(weight, grid=make_grid(3)), refine_grid(weight[16:].float(), grid=make_grid(3))
    assert torch.equal(found.scale[16:], alone.scale)
    assert torch.equal(found.codes[16:], alone.codes)
    assert found.errors.shape[1:] == (18, 1)


def test_a_row_without_zero_is_refined_on_its_own_range_with_a_real_zero_point():
    weight = make_weight() + torch.tensor([0.0, 3.0, -3.0, 0.0, 9.0, 0.0])[:, None]
    moved = torch.tensor([False, True, True, False, True, False])
    for bits in (2, 3, 4):
        real, whole = (refine_grid(weight, grid=make_grid(bits, kind)) for kind in ("real", "integer"))
        outside = (real.zero_point < 0) | (real.zero_point > 2**bits - 1)
        assert torch.equal(outside.flatten(), moved)
        assert (real.errors[-1][moved] < 0.9 * whole.errors[-1][moved]).all()
