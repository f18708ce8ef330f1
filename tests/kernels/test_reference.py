"""The reference backend against the numpy oracle (oracle.py): accumulators and outputs equal, to the bit."""

import itertools
import math

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from qvgen_kernels import LinearSpec, LinearTensors, packed_linear, prepack
from qvgen_kernels.reference import accumulate, block_hadamard, quantize_activations
from tests.kernels import oracle
from tests.kernels.layer import DTYPES, as64, make_layer, make_rows

WEIGHTS, ACTIVATIONS = ("integer", "real", "none"), ("integer", "none")


def make_clips(rows, *, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.rand(rows, generator=generator) * 0.3 + 0.7 for _ in range(2))


def assert_equals_oracle(layer, x, *, clips=(None, None)):
    acc, y32, exact, bound = layer.oracle(x, clips=clips)
    operand, _, _ = quantize_activations(x, spec=layer.spec, tensors=LinearTensors(None, *clips))
    ours = accumulate(operand, layer.weight, spec=layer.spec)
    assert ours.dtype == torch.int32
    assert torch.equal(ours.long(), torch.from_numpy(acc))
    y = layer(x, clips=clips)
    dtype = str(x.dtype).removeprefix("torch.")
    assert y.dtype == x.dtype
    np.testing.assert_array_equal(as64(y), oracle.round_to(y32, dtype))
    # against no rounding at all: at most 6 roundings a group, each of a number that the bound covers
    assert (np.abs(y32 - exact) <= 6 * layer.spec.num_groups * 2.0**-24 * bound).all()


@pytest.mark.parametrize("weight_zero_point", WEIGHTS)
@pytest.mark.parametrize("activation_zero_point", ACTIVATIONS)
def test_every_pair_of_bits(weight_zero_point, activation_zero_point):
    for weight_bits, activation_bits in itertools.product(range(2, 9), repeat=2):
        layer = make_layer(
            seed=weight_bits,
            weight_bits=weight_bits,
            activation_bits=activation_bits,
            weight_zero_point=weight_zero_point,
            activation_zero_point=activation_zero_point,
        )
        assert_equals_oracle(layer, make_rows(4, 24, seed=activation_bits), clips=make_clips(4))


@st.composite
def cases(draw):
    group = draw(st.sampled_from([1, 2, 5, 8, 16, 24]))
    columns = group * draw(st.integers(1, 4))
    rotations = [0] + [size for size in (2, 4, 8, 12, 16, 20, 24, 32, 40, 64) if columns % size == 0]
    options = {
        "in_features": columns,
        "out_features": draw(st.integers(1, 9)),
        "weight_bits": draw(st.integers(2, 8)),
        "activation_bits": draw(st.integers(2, 8)),
        "weight_zero_point": draw(st.sampled_from(WEIGHTS)),
        "activation_zero_point": draw(st.sampled_from(ACTIVATIONS)),
        "weight_group_size": draw(st.sampled_from([0, group])),
        "activation_group_size": draw(st.sampled_from([0, group])),
        "scale_dtype": draw(st.sampled_from(list(DTYPES))),
        "rotation": draw(st.sampled_from(rotations)),
    }
    if options["rotation"] in (4, 16, 64):
        options["rotation_kind"] = draw(st.sampled_from(["sylvester", "regular"]))
    if options["activation_zero_point"] == "none":
        options["activation_arithmetic"] = draw(st.sampled_from(["reciprocal", "division", "unrounded"]))
    return options, draw(st.integers(1, 6)), draw(st.sampled_from(list(DTYPES))), draw(st.integers(0, 2**20))


@settings(max_examples=150, derandomize=True)
@given(cases())
def test_any_spec(case):
    options, rows, dtype, seed = case
    layer = make_layer(seed=seed, **options)
    x = make_rows(rows, options["in_features"], seed=seed, dtype=DTYPES[dtype])
    assert_equals_oracle(layer, x, clips=make_clips(rows, seed=seed))


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("rotation", [0, 8, 24])
def test_an_input_scale_is_a_product_in_float32_before_all_else(dtype, rotation):
    layer = make_layer(rotation=rotation)
    x = make_rows(5, 24, dtype=DTYPES[dtype])
    scale = torch.linspace(-3, 2, 24)
    scaled = as64(x) * as64(scale)
    in_float32 = torch.from_numpy(scaled).float()  # one rounding
    expected = layer(in_float32).to(x.dtype)
    assert torch.equal(layer(x, input_scale=scale), expected)
    assert_equals_oracle(layer, in_float32)


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("kind", ACTIVATIONS)
@pytest.mark.parametrize("weight_group_size", [0, 8])
def test_static_ranges_take_every_rows_scale_and_zero_point_as_given(dtype, kind, weight_group_size):
    layer = make_layer(
        activation_range="static", activation_zero_point=kind, activation_bits=4, weight_group_size=weight_group_size
    )
    x = make_rows(5, 24, dtype=DTYPES[dtype])
    scale, zero = torch.logspace(-3, 1, 5), torch.tensor([0.0, 3.0, 15.0, 7.0, 8.0])
    y = layer(x, row_scale=scale, row_zero_point=zero if kind == "integer" else None)
    assert torch.equal(y, oracle_of_static(layer, x, scale, zero if kind == "integer" else None).to(x.dtype))


def oracle_of_static(layer, x, scale, zero):
    """float32 [M, N]: numpy in float64, every product rounded to float32 as the contract says."""
    low, high = (0, 15) if zero is not None else (-7, 7)
    z = np.zeros(len(x)) if zero is None else as64(zero)
    inverse = oracle.r32(1.0 / as64(scale))[:, None]
    codes = np.clip(np.rint(oracle.r32(as64(x) * inverse)) + z[:, None], low, high)
    weight = layer.codes.numpy().astype(np.float64)
    scales, zeros = (as64(t).reshape(len(weight), -1) for t in (layer.scale, layer.zero_point))
    y = None
    for group, columns in enumerate(np.split(np.arange(24), scales.shape[1])):
        acc = (codes - z[:, None])[:, columns] @ (weight[:, columns] - zeros[:, [group]]).T
        term = oracle.r32(oracle.r32(oracle.r32(acc) * as64(scale)[:, None]) * scales[:, group])
        y = term if y is None else oracle.r32(y + term)
    return torch.from_numpy(oracle.r32(y + as64(layer.bias))).float()


def test_static_ranges_saturate_an_infinity_and_keep_a_nan_in_its_row():
    layer = make_layer(activation_range="static")
    x = make_rows(3, 24)
    plain = layer(x, row_scale=torch.ones(3), row_zero_point=torch.ones(3))
    x[0, 5], x[1, 5] = math.nan, math.inf
    y = layer(x, row_scale=torch.ones(3), row_zero_point=torch.ones(3))
    assert y[0].isnan().all()
    assert y[1].isfinite().all()
    assert torch.equal(y[2], plain[2])


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_the_branch_is_added_in_float32_before_the_bias(dtype):
    layer = make_layer(branch_rank=3, rotation=8)
    plain = make_layer(rotation=8)
    layer.bias.zero_()
    plain.bias.zero_()
    x = torch.randn(5, 24, generator=torch.Generator().manual_seed(0)).to(DTYPES[dtype])
    down, up = (torch.randn(*shape, generator=torch.Generator().manual_seed(1)) for shape in ((3, 24), (7, 3)))
    scale = torch.linspace(1, 2, 24)  # the branch sees x as it came
    found = layer(x, input_scale=scale, branch_down=down.bfloat16(), branch_up=up.bfloat16())
    low_rank = as64(x) @ as64(down.bfloat16()).T @ as64(up.bfloat16()).T
    expected = as64(plain(x.float(), input_scale=scale)) + low_rank
    # two products and one sum round in x's dtype
    tolerance = 4 * torch.finfo(x.dtype).eps * (1 + np.abs(low_rank).max())
    assert np.abs(as64(found) - expected).max() < tolerance


@pytest.mark.parametrize(("columns", "rows"), [(258, 3), (259, 3), (1031, 2)])
def test_sums_around_the_float32_limit(columns, rows):
    layer = make_layer(in_features=columns, weight_bits=8, activation_bits=8)
    assert_equals_oracle(layer, make_rows(rows, columns))


@pytest.mark.parametrize("columns", [258, 259, 33025])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_sum_is_exact(columns, sign):
    # one-sided row: z = 0 (or qmax), every operand +-255; every weight operand 255
    spec = LinearSpec(in_features=columns, out_features=1, weight_bits=8, activation_bits=8)
    codes = torch.full((1, columns), 255, dtype=torch.uint8)
    zero_point = torch.zeros(1, dtype=torch.uint8)
    weight = prepack([codes], scale=torch.ones(1), zero_point=zero_point, spec=spec, kernel="reference")
    operand, _, _ = quantize_activations(torch.full((1, columns), float(sign)), spec=spec)
    assert accumulate(operand, weight, spec=spec).item() == sign * spec.accumulator_bound


@pytest.mark.parametrize("activation_zero_point", ACTIVATIONS)
@pytest.mark.parametrize("scale_dtype", list(DTYPES))
@pytest.mark.parametrize("group", [0, 8])
def test_extreme_rows_are_finite_and_alone(activation_zero_point, scale_dtype, group):
    layer = make_layer(
        activation_zero_point=activation_zero_point,
        scale_dtype=scale_dtype,
        weight_group_size=group,
        activation_group_size=group,
        activation_bits=4,
    )
    x = make_rows(9, 24)
    plain = layer(x)
    x[0] = 0.0
    x[1] = 5.0
    x[2] = -5.0
    x[3] = x[3].abs() + 3.0
    x[4] = -x[4].abs() - 3.0
    x[5] *= 1e30
    x[6] = 1e-30 * (x[6] + 1)
    y = layer(x)
    assert y.isfinite().all()
    assert torch.equal(y[0], layer.bias)
    assert torch.equal(y[6], layer.bias)
    assert torch.equal(y[7:], plain[7:])
    assert_equals_oracle(layer, x)


@pytest.mark.parametrize("dtype", list(DTYPES.values()))
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"activation_zero_point": "none"},
        {"weight_zero_point": "real", "scale_dtype": "float16"},
        {"activation_group_size": 8, "scale_dtype": "bfloat16"},
        {"rotation": 8},
        {"rotation": 24},
    ],
)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_bad_value_spoils_its_row_only(dtype, options, bad):
    layer = make_layer(**options)
    x = make_rows(5, 24, dtype=dtype)
    plain = layer(x)
    assert plain.isfinite().all()
    x[2, 17] = bad
    y = layer(x)
    assert y[2].isnan().all()
    keep = [0, 1, 3, 4]
    assert torch.equal(y[keep], plain[keep])


def test_a_range_beyond_float32_is_nan():
    layer = make_layer()
    x = make_rows(3, 24)
    plain = layer(x)
    x[1, :2] = torch.tensor([3e38, -3e38])
    y = layer(x)
    assert y[1].isnan().all()
    assert torch.equal(y[::2], plain[::2])


@pytest.mark.parametrize(
    "options",
    [
        {"in_features": 192, "rotation": 64},
        {"in_features": 240, "rotation": 240},
        {"in_features": 192, "weight_bits": 8, "activation_bits": 8, "weight_zero_point": "real"},
        {"in_features": 320, "weight_bits": 8, "activation_bits": 8},
        {"in_features": 192, "weight_group_size": 64, "activation_group_size": 64},
    ],
)
def test_a_row_is_the_same_alone_and_with_any_number_of_threads(options):
    layer = make_layer(out_features=70, **options)
    x = make_rows(65, options["in_features"], dtype=torch.bfloat16)
    clips = make_clips(65)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = layer(x, clips=clips)
        alone = [layer(x[m : m + 1], clips=(clips[0][m, None], clips[1][m, None])) for m in range(65)]
        torch.set_num_threads(3)
        three = layer(x, clips=clips)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(one, torch.cat(alone))
    assert torch.equal(one, three)


def test_leading_dimensions_and_strides_do_not_matter():
    layer = make_layer()
    x = make_rows(30, 24)
    y = layer(x)
    assert torch.equal(layer(x.view(2, 3, 5, 24)), y.view(2, 3, 5, 7))
    assert torch.equal(layer(x.t().contiguous().t()), y)
    wide = torch.zeros(30, 48)
    wide[:, ::2] = x
    assert torch.equal(layer(wide[:, ::2]), y)
    assert torch.equal(layer(x.view(5, 6, 24).transpose(0, 1)), y.view(5, 6, 7).transpose(0, 1))
    assert torch.equal(layer(x[0]), y[0])
    assert layer(x.view(2, 3, 5, 24).transpose(0, 2)).is_contiguous()
    for empty in (torch.zeros(0, 24), torch.zeros(2, 0, 24)):
        assert layer(empty).shape == (*empty.shape[:-1], 7)


def test_inputs_are_left_as_they_were():
    layer = make_layer(rotation=8)
    x, clips = make_rows(5, 24), make_clips(5)
    before = [tensor.clone() for tensor in (x, *clips, *layer.weight, layer.bias)]
    layer(x, clips=clips)
    assert all(torch.equal(a, b) for a, b in zip(before, (x, *clips, *layer.weight, layer.bias), strict=True))


def test_missing_clips_and_bias_are_one_and_zero():
    layer = make_layer()
    x, ones = make_rows(5, 24), torch.ones(5)
    assert torch.equal(layer(x), layer(x, clips=(ones, ones)))
    without = packed_linear(x, weight=layer.weight, spec=layer.spec, kernel="reference")
    layer.bias.zero_()
    assert torch.equal(without, layer(x))


def test_clips_narrow_their_own_end_and_row():
    spec = LinearSpec(in_features=2, out_features=1, weight_bits=4, activation_bits=4)
    x = torch.tensor([[-8.0, 8.0], [-8.0, 8.0]])
    clip_low, clip_high = torch.tensor([0.5, 1.0]), torch.tensor([1.0, 0.25])
    _, scale, zero_point = quantize_activations(x, spec=spec, tensors=LinearTensors(None, clip_low, clip_high))
    assert scale[:, 0].tolist() == [np.float32(12 / 15), np.float32(10 / 15)]
    assert zero_point[:, 0].tolist() == [5.0, 12.0]


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_reduced_precision_modes_of_torch_change_nothing(precision):
    layers = [make_layer(in_features=192, weight_bits=bits, activation_bits=8, out_features=64) for bits in (3, 8)]
    x = make_rows(64, 192)
    expected = [layer(x) for layer in layers]
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        got = [layer(x) for layer in layers]
        with torch.autocast("cpu", torch.bfloat16):
            got += [layer(x) for layer in layers]
    finally:
        torch.set_float32_matmul_precision(before)
    assert all(torch.equal(a, b) for a, b in zip(got, expected * 2, strict=True))


@pytest.mark.parametrize("block", [2, 8, 32, 128])
def test_hadamard_is_the_orthogonal_sylvester_matrix(block):
    index = np.arange(block)
    parity = np.vectorize(lambda bits: bin(bits).count("1"))(index[:, None] & index[None, :])
    matrix = torch.from_numpy((1.0 - 2 * (parity % 2)) / np.sqrt(block))
    x = make_rows(6, 256)
    expected = (x.double().unflatten(-1, (-1, block)) @ matrix).flatten(-2)
    y = block_hadamard(x, block=block)
    # log2(block) additions and a multiplication, each within 2^-24 of sums that the row's block norm bounds
    size = x.double().unflatten(-1, (-1, block)).norm(dim=-1, keepdim=True).expand(-1, -1, block).flatten(-2)
    error = (y.double() - expected).abs()
    assert (error <= (np.log2(block) + 2) * 2.0**-24 * np.sqrt(block) * size).all()
    torch.testing.assert_close(block_hadamard(y, block=block), x, rtol=0, atol=1e-6 * float(x.abs().max()))
