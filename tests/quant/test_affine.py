"""The grid arithmetic against the float64 oracle, its algebraic laws, and golden values worked out by hand.

fake_quantize == dequantize(quantize) is compared through the bits of the floats, so that -0.0 is not 0.0.
"""

import itertools

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis.extra import numpy as hnp

from qvgen.quant.affine import choose_qparams, dequantize, fake_quantize, quantize
from qvgen.quant.grid import MIN_SCALE, Grid
from tests import oracles

KINDS = ("integer", "real", "none")
DTYPES = ("float32", "bfloat16", "float16")
GRANULARITIES = ("per_tensor", "per_channel", "per_token", "per_group")
WIDTH = 24


def make_grid(bits, granularity="per_token", zero_point="integer", scale_dtype="float32"):
    group = 8 if granularity == "per_group" else None
    return Grid(bits=bits, granularity=granularity, zero_point=zero_point, group_size=group, scale_dtype=scale_dtype)


def make_rows(seed=0, rows=12):
    """Rows of sizes 1e-3 to 1e3 with outliers, then a zero, a constant, two one-sided and two extreme rows."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, WIDTH, generator=generator) * torch.logspace(-3, 3, rows).unsqueeze(-1)
    x[:, 3] *= 20
    special = torch.stack(
        [
            torch.zeros(WIDTH),
            torch.full((WIDTH,), 0.7),
            torch.full((WIDTH,), -0.7),
            torch.rand(WIDTH, generator=generator) + 1,
            -torch.rand(WIDTH, generator=generator) - 1,
            torch.randn(WIDTH, generator=generator) * 1e30,
            torch.randn(WIDTH, generator=generator) * 1e-30,
        ]
    )
    return torch.cat([x, special])


def bits_of(x):
    return x.contiguous().view(torch.int32)


def expand(qparam, x, grid):
    """A public scale or zero point, repeated to the shape of x."""
    if grid.granularity == "per_tensor":
        return qparam.expand(x.shape)
    return qparam.repeat_interleave(x.shape[-1] // qparam.shape[-1], -1)


def grid_values(x, grid, **clips):
    scale, zero_point = choose_qparams(x, grid=grid, **clips)
    return fake_quantize(x, scale=scale, zero_point=zero_point, grid=grid), scale, zero_point


# --------------------------------------------------------------------------- one grid


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("zero_point", KINDS)
@pytest.mark.parametrize("scale_dtype", DTYPES)
def test_fake_quantize_is_dequantize_of_quantize(granularity, zero_point, scale_dtype):
    x = make_rows()
    for bits in range(2, 9):
        grid = make_grid(bits, granularity, zero_point, scale_dtype)
        values, scale, zero = grid_values(x, grid)
        codes = quantize(x, scale=scale, zero_point=zero, grid=grid)
        assert codes.dtype == (torch.int8 if zero_point == "none" else torch.uint8)
        assert int(codes.min()) >= grid.qmin
        assert int(codes.max()) <= grid.qmax
        assert values.dtype == torch.float32
        assert torch.equal(bits_of(values), bits_of(dequantize(codes, scale=scale, zero_point=zero, grid=grid)))


def test_a_small_negative_number_becomes_a_positive_zero():
    """Codes have no -0, so no grid value may be one: also where a real zero point is 0."""
    x, one, zero = torch.tensor([[-0.3, -0.0, 0.3]]), torch.ones(1, 1), torch.zeros(1, 1)
    for kind in KINDS:
        values = fake_quantize(x, scale=one, zero_point=zero, grid=make_grid(4, zero_point=kind))
        assert (bits_of(values) == 0).all(), kind


floats = st.floats(-(2.0**99), 2.0**99, width=32) | st.floats(-4, 4, width=32) | st.sampled_from([0.0, -0.0, 1e-30])


@settings(max_examples=150)
@given(
    x=hnp.arrays(np.float32, (3, 8), elements=floats),
    bits=st.integers(2, 8),
    granularity=st.sampled_from(GRANULARITIES),
    zero_point=st.sampled_from(KINDS),
    scale_dtype=st.sampled_from(DTYPES),
    learned=st.none() | st.tuples(st.floats(1e-6, 1e6), st.floats(0, 3)),
)
def test_laws_hold_for_any_rows(x, bits, granularity, zero_point, scale_dtype, learned):
    """One grid, idempotent, at most 2^b levels; also with a scale and zero point that do not fit the data."""
    x = torch.from_numpy(x)
    grid = make_grid(bits, granularity, zero_point, scale_dtype)
    scale, zero = choose_qparams(x, grid=grid)
    if learned is not None:
        scale = torch.full_like(scale, learned[0])
        zero = torch.zeros_like(zero) if zero_point == "none" else torch.full_like(zero, learned[1])
        zero = zero if zero_point == "real" else zero.round()
    values = fake_quantize(x, scale=scale, zero_point=zero, grid=grid)
    codes = quantize(x, scale=scale, zero_point=zero, grid=grid)
    assert values.isfinite().all()
    assert torch.equal(bits_of(values), bits_of(dequantize(codes, scale=scale, zero_point=zero, grid=grid)))
    assert torch.equal(values, fake_quantize(values, scale=scale, zero_point=zero, grid=grid))
    assert torch.equal(codes, quantize(values, scale=scale, zero_point=zero, grid=grid))


# --------------------------------------------------------------------------- against the oracle


@pytest.mark.parametrize("zero_point", KINDS)
@pytest.mark.parametrize("scale_dtype", DTYPES)
@pytest.mark.parametrize("clips", [(1.0, 1.0), (0.9, 0.75)])
def test_codes_and_scales_match_the_float64_oracle(zero_point, scale_dtype, clips):
    x = make_rows(seed=3)[:-1]  # the oracle does not round 1e-30 like float32 does
    compared = 0
    for bits in range(2, 9):
        grid = make_grid(bits, "per_token", zero_point, scale_dtype)
        values, scale, zero = grid_values(x, grid, clip_low=torch.tensor(clips[0]), clip_high=torch.tensor(clips[1]))
        codes = quantize(x, scale=scale, zero_point=zero, grid=grid)
        for m, row in enumerate(x.double().numpy()):
            options = {"bits": bits, "kind": zero_point}
            clip = dict(zip(("clip_low", "clip_high"), map(float, torch.tensor(clips)), strict=True))
            if zero_point == "real" and clips != (1.0, 1.0) and not min(row) <= 0 <= max(row):
                continue  # clips are of activations, which have no real zero points: ends of one sign cancel
            plain, _ = oracles.choose_qparams(row, **options, **clip)
            s, z = oracles.choose_qparams(row, **options, **clip, scale_dtype=scale_dtype)
            if oracles.scale_tie_distance(plain, scale_dtype) < 1e-3:
                continue  # which 16-bit neighbour is nearer is decided by float32 rounding
            # Two float32 operations (clip, subtract or divide) of half an ulp each, then none or an exact cast.
            assert abs(scale[m].item() - s) <= 2 * 2.0**-23 * s
            # -lo/s: up to 2^8, or what a row's distance from 0 makes of it; four float32 roundings.
            tolerance = 0.0 if zero_point != "real" else max(2.0**8, abs(z)) * 4 * 2.0**-24
            low = min(0.0, *row) * clip["clip_low"]
            if zero_point == "integer" and oracles.tie_distance(np.array([low]), s, 0.0, kind="integer") < 1e-3:
                continue
            assert abs(zero[m].item() - z) <= tolerance
            if oracles.tie_distance(row, s, z, kind=zero_point) < 1e-3:
                # Codes of elements that are nearly tied may differ by one; all others may not.
                position = row / s + (z if zero_point == "real" else 0.0)
                sure = np.abs(position - np.floor(position) - 0.5) >= 1e-3
            else:
                sure = np.ones_like(row, bool)
            expected = oracles.quantize(row, s, z, **options)
            assert (codes[m].numpy()[sure] == expected[sure]).all()
            compared += int(sure.sum())
            # Values: the scale's error times at most 2^8 codes, and z's, and the product's rounding.
            bound = s * (np.abs(expected - z) * 4 * 2.0**-23 + tolerance) + 1e-37
            true = oracles.fake_quantize(row, s, z, **options)
            assert (np.abs(values[m].double().numpy() - true)[sure] <= bound[sure]).all()
    assert compared > 0.6 * 7 * x.numel()


def test_golden_values_of_a_tiny_example():
    """-1 .. 2.5 on 3 bits: s = 3.5/7 = 1/2, z = 2; -1..1 on 3 bits symmetric: s = 1.5/3 = 1/2."""
    x = torch.tensor([[-1.0, 0.0, 0.4, 1.2, 2.5]])
    grid = make_grid(3)
    values, scale, zero = grid_values(x, grid)
    assert (scale.tolist(), zero.tolist()) == ([[0.5]], [[2.0]])
    assert quantize(x, scale=scale, zero_point=zero, grid=grid).tolist() == [[0, 2, 3, 4, 7]]
    assert values.tolist() == [[-1.0, 0.0, 0.5, 1.0, 2.5]]

    x = torch.tensor([[-1.5, -0.3, 0.2, 0.7]])
    grid = make_grid(3, zero_point="none")
    values, scale, zero = grid_values(x, grid)
    assert (scale.tolist(), zero.tolist()) == ([[0.5]], [[0.0]])
    assert quantize(x, scale=scale, zero_point=zero, grid=grid).tolist() == [[-3, -1, 0, 1]]
    assert values.tolist() == [[-1.5, -0.5, 0.0, 0.5]]

    x = torch.tensor([[-0.75, 0.0, 1.0, 2.75]])  # real: s = 1/2, z = 1.5, no zero on the grid; 1.5 rounds to 2
    grid = make_grid(3, zero_point="real")
    values, scale, zero = grid_values(x, grid)
    assert (scale.tolist(), zero.tolist()) == ([[0.5]], [[1.5]])
    assert quantize(x, scale=scale, zero_point=zero, grid=grid).tolist() == [[0, 2, 4, 7]]
    assert values.tolist() == [[-0.75, 0.25, 1.25, 2.75]]


def test_clips_shorten_each_end_by_itself():
    x = torch.tensor([[-2.0, 0.1, 4.0], [-2.0, 0.1, 4.0]])
    scale, zero = choose_qparams(
        x, grid=make_grid(2), clip_low=torch.tensor([[0.5], [1.0]]), clip_high=torch.tensor([[0.5], [0.25]])
    )
    assert scale.tolist() == [[1.0], [1.0]]  # (2 + 1) / 3, (1 + 2) / 3
    assert zero.tolist() == [[1.0], [2.0]]
    scale, _ = choose_qparams(x, grid=make_grid(2, zero_point="none"), clip_high=torch.tensor([[0.5], [0.25]]))
    assert scale.tolist() == [[2.0], [1.0]]


def test_ties_round_to_even():
    one, zero = torch.ones(1, 1), torch.zeros(1, 1)
    x = torch.tensor([[0.5, 1.5, 2.5, 3.5, -0.5, -1.5]])
    codes = quantize(x, scale=one, zero_point=zero, grid=make_grid(4, zero_point="none"))
    assert codes.tolist() == [[0, 2, 2, 4, 0, -2]]
    # An integer zero point is added after the rounding, a real one before it.
    assert quantize(x, scale=one, zero_point=one * 3, grid=make_grid(4)).tolist() == [[3, 5, 5, 7, 3, 1]]
    codes = quantize(x, scale=one, zero_point=one * 3, grid=make_grid(4, zero_point="real"))
    assert codes.tolist() == [[4, 4, 6, 6, 2, 2]]


def test_the_reciprocal_is_rounded_before_the_product():
    """Dividing flips codes: among scales and half codes, those that differ must follow x * (1 / s)."""
    scale = torch.linspace(0.01, 0.02, 4001)[:, None]
    x = scale * torch.arange(0.5, 7, 1)
    product, quotient = (x * (1.0 / scale)).round(), (x / scale).round()
    assert (product != quotient).any()
    codes = quantize(x, scale=scale, zero_point=torch.zeros_like(scale), grid=make_grid(4, zero_point="none"))
    assert torch.equal(codes.float(), product)


def test_the_zero_point_uses_the_same_reciprocal():
    x = torch.randn(200, WIDTH, generator=torch.Generator().manual_seed(4))
    scale, zero = choose_qparams(x, grid=make_grid(8, zero_point="real"))
    low = x.amin(1, keepdim=True)
    assert (-low / scale != -low * (1.0 / scale)).any()
    assert torch.equal(zero, -low * (1.0 / scale))


# --------------------------------------------------------------------------- laws


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("zero_point", KINDS)
def test_monotone_few_levels_and_near(granularity, zero_point):
    x = make_rows(seed=1, rows=6)[:-2]
    for bits, dtype in itertools.product(range(2, 9), DTYPES):
        grid = make_grid(bits, granularity, zero_point, dtype)
        values, scale, zero = grid_values(x, grid)
        s, z = expand(scale, x, grid), expand(zero, x, grid)
        group = 8 if granularity == "per_group" else WIDTH
        rows, row_values = x.unflatten(-1, (-1, group)), values.unflatten(-1, (-1, group))
        order = rows.argsort(-1)
        assert (row_values.gather(-1, order).diff(dim=-1) >= 0).all()
        assert all(len(row.unique()) <= grid.qmax - grid.qmin + 1 for row in row_values.reshape(-1, group))
        inside = (x >= s * (grid.qmin - z)) & (x <= s * (grid.qmax - z))
        # Half a step; x * (1/s) is off by two float32 roundings of at most 2^8 codes and the zero point.
        assert ((values - x).abs() <= s * (0.5 + (2.0**8 + z.abs()) * 2.0**-22))[inside].all()


@pytest.mark.parametrize("zero_point", ["integer", "none"])
def test_zero_stays_exactly_zero(zero_point):
    x = make_rows()
    x[:, ::5] = 0.0
    for bits, granularity in itertools.product(range(2, 9), GRANULARITIES):
        values = grid_values(x, make_grid(bits, granularity, zero_point))[0]
        assert (bits_of(values[:, ::5]) == 0).all()


@pytest.mark.parametrize("zero_point", KINDS)
@pytest.mark.parametrize("scale_dtype", DTYPES)
def test_special_rows_are_finite_and_sane(zero_point, scale_dtype):
    x = make_rows(rows=1)
    for bits in range(2, 9):
        values, scale, zero = grid_values(x, make_grid(bits, "per_token", zero_point, scale_dtype))
        assert values.isfinite().all()
        assert scale.isfinite().all()
        assert (scale >= torch.tensor(MIN_SCALE)).all()
        if zero_point == "real":
            assert (zero.abs() <= 2.0**17).all()
        else:
            assert ((zero >= 0) & (zero <= 2**bits - 1)).all()
        assert (values[1] == 0).all()
        # A constant is an end of its range: one rounding of the 16-bit scale (2^-8) is all that is lost.
        for row in (2, 3):
            assert len(values[row].unique()) == 1
            torch.testing.assert_close(values[row], x[row], rtol=2.0**-8, atol=0.0)
        assert (values[4] >= 0).all()
        assert (values[5] <= 0).all()


@pytest.mark.parametrize("zero_point", KINDS)
@pytest.mark.parametrize("granularity", ["per_channel", "per_token", "per_group"])
def test_a_disturbed_row_changes_no_other(zero_point, granularity):
    x = make_rows(rows=5)
    grid = make_grid(4, granularity, zero_point)
    before = grid_values(x, grid)
    for replacement in (0.0, 1e30, -5.0, float("nan"), float("inf")):
        disturbed = x.clone()
        disturbed[2] = replacement
        others = torch.arange(len(x)) != 2
        for old, new in zip(before, grid_values(disturbed, grid), strict=True):
            assert torch.equal(old[others], new[others])
    if granularity == "per_group":
        disturbed = x.clone()
        disturbed[:, 9] = 1e3
        values = grid_values(disturbed, grid)[0]
        assert torch.equal(values[:, :8], before[0][:, :8])
        assert torch.equal(values[:, 16:], before[0][:, 16:])
    alone = [grid_values(row.unsqueeze(0), grid)[0] for row in x]
    assert torch.equal(before[0], torch.cat(alone))


# --------------------------------------------------------------------------- shapes and types


def test_public_shapes():
    x = make_rows(rows=5).reshape(3, 4, WIDTH)
    shapes = {"per_token": (3, 4, 1), "per_channel": (3, 4, 1), "per_group": (3, 4, 3), "per_tensor": (1,)}
    for granularity, shape in shapes.items():
        for kind in KINDS:
            grid = make_grid(4, granularity, kind)
            values, scale, zero = grid_values(x, grid)
            assert (values.shape, scale.shape, zero.shape) == (x.shape, shape, shape)
            assert scale.dtype == zero.dtype == torch.float32
    with pytest.raises(ValueError, match="group_size=8 does not divide in_features=12"):
        choose_qparams(x[..., :12], grid=make_grid(4, "per_group"))


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_arithmetic_is_float32_whatever_comes_in(granularity, dtype):
    x = make_rows()[:-2].to(dtype)
    grid = make_grid(4, granularity)
    for got, expected in zip(grid_values(x, grid), grid_values(x.float(), grid), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_strides_do_not_matter_and_nothing_is_written(granularity):
    x = make_rows()
    grid = make_grid(4, granularity)
    expected = grid_values(x, grid)
    strided = torch.stack([x, torch.full_like(x, torch.nan)], -1)[..., 0]
    assert not strided.is_contiguous()
    for source in (strided, x.t().contiguous().t()):
        copy = source.clone()
        scale, zero = choose_qparams(source, grid=grid)
        values = fake_quantize(source, scale=scale, zero_point=zero, grid=grid)
        codes = quantize(source, scale=scale, zero_point=zero, grid=grid)
        assert torch.equal(values, expected[0])
        assert torch.equal(dequantize(codes, scale=scale, zero_point=zero, grid=grid), expected[0])
        assert torch.equal(source, copy)
        assert torch.equal(scale, expected[1])


def test_16_bit_scales_are_numbers_of_their_dtype():
    x = make_rows()
    for dtype in ("bfloat16", "float16"):
        for kind in KINDS:
            scale = choose_qparams(x, grid=make_grid(4, "per_token", kind, dtype))[0]
            assert torch.equal(scale.to(getattr(torch, dtype)).float(), scale)


# --------------------------------------------------------------------------- rows that do not contain 0


def range_with_zero(x, grid):
    """Scale and zero point of rows whose ranges are made to contain 0, written out for groups of the last dimension."""
    rows = x.unflatten(-1, (-1, 8)) if grid.granularity == "per_group" else x[..., None, :]
    low, high = rows.amin(-1).clamp(max=0), rows.amax(-1).clamp(min=0)
    scale = ((high - low) / torch.tensor(float(grid.qmax))).clamp(min=MIN_SCALE)
    scale = scale.to(grid.torch_scale_dtype).float()
    if grid.scale_dtype == "float16":
        scale = scale.clamp(2.0**-14, 65504.0)
    zero = -low * (1.0 / scale)
    return scale, (zero.round() if grid.zero_point == "integer" else zero).clamp(0, grid.qmax)


@pytest.mark.parametrize("granularity", ["per_channel", "per_group"])
@pytest.mark.parametrize("scale_dtype", DTYPES)
def test_a_row_that_contains_zero_has_the_same_bits_and_every_row_with_an_integer_zero_point(granularity, scale_dtype):
    x = make_rows(seed=5)
    x = torch.cat([x, x.clamp(min=0), x.clamp(max=0), x.abs() + 0.1])
    contain = 0
    for bits, kind in itertools.product(range(2, 9), ("integer", "real")):
        grid = make_grid(bits, granularity, kind, scale_dtype)
        scale, zero = choose_qparams(x, grid=grid)
        old_scale, old_zero = range_with_zero(x, grid)
        groups = x.unflatten(-1, (scale.shape[1], -1))
        same = (groups.amin(-1) <= 0) & (groups.amax(-1) >= 0)
        contain += int(same.sum())
        same |= kind == "integer"
        assert torch.equal(bits_of(scale[same]), bits_of(old_scale[same]))
        assert torch.equal(zero[same], old_zero[same])
        codes = quantize(x, scale=scale, zero_point=zero, grid=grid).unflatten(-1, (scale.shape[1], -1))
        old = quantize(x, scale=old_scale, zero_point=old_zero, grid=grid).unflatten(-1, (scale.shape[1], -1))
        assert torch.equal(codes[same], old[same])
    assert contain > 300


def test_a_row_without_zero_has_all_codes_for_itself_with_a_real_zero_point():
    """1 .. 2.5 on 2 bits: s = 1/2, z = -2; made to contain 0 it had s = 2.5/3. -2.5 .. -1: s = 1/2, z = 5."""
    x = torch.tensor([[1.0, 1.5, 2.1, 2.5], [-2.5, -2.0, -1.6, -1.0]])
    values, scale, zero = grid_values(x, make_grid(2, zero_point="real"))
    assert (scale.tolist(), zero.tolist()) == ([[0.5], [0.5]], [[-2.0], [5.0]])
    assert values.tolist() == [[1.0, 1.5, 2.0, 2.5], [-2.5, -2.0, -1.5, -1.0]]
    x = torch.rand(20, WIDTH, generator=torch.Generator().manual_seed(0)) + 2
    for bits in range(2, 9):
        grid = make_grid(bits, zero_point="real")
        old_scale, old_zero = range_with_zero(x, grid)
        values, scale, zero = grid_values(x, grid)
        before = fake_quantize(x, scale=old_scale, zero_point=old_zero, grid=grid)
        assert (zero < -grid.qmax).all()
        assert (scale < old_scale / 2.5).all()  # the range is 1 and was 3
        assert (values - x).square().sum() < 0.25 * (before - x).square().sum()


def test_a_row_far_from_zero_keeps_its_offset():
    """Spreads down to none beside an offset: the error is half a step, or 2^-17 of the offset where that is more."""
    spread = torch.linspace(-1, 1, WIDTH)
    for offset, size, bits in itertools.product((1e-6, 1.0, -3e4, 1e20), (0.0, 1e-7, 1e-5, 1e-3, 0.5), (2, 4, 8)):
        x = (offset * (1 + size * spread))[None]
        values, scale, zero = grid_values(x, make_grid(bits, zero_point="real"))
        assert zero.abs().item() <= 2.0**17
        step = max(2 * abs(offset) * size / (2**bits - 1), abs(offset) * 2.0**-16, MIN_SCALE)
        assert scale.item() == pytest.approx(step, rel=1e-2)
        # Two roundings of numbers of the offset's size besides.
        assert (values - x).abs().max() <= 0.51 * step * (1 + size) + abs(offset) * 2.0**-22
