"""Inputs are quantized as in training: equal to qvgen.quant.affine and qvgen.quant.hadamard, to the bit."""

import itertools
from dataclasses import replace

import pytest
import torch

from qvgen.layers.fake_quant_product import rotated
from qvgen.quant.affine import choose_qparams, dequantize, dequantizing_scale, fake_quantize, quantize
from qvgen.quant.grid import Grid, Profile
from qvgen.quant.hadamard import hadamard_transform
from qvgen_kernels import LinearSpec, LinearTensors
from qvgen_kernels.reference import quantize_activations
from tests.kernels.layer import DTYPES, make_rows

WEIGHT = Grid(bits=4, granularity="per_channel")


@pytest.mark.parametrize("zero_point", ["integer", "none"])
@pytest.mark.parametrize("scale_dtype", list(DTYPES))
@pytest.mark.parametrize("group", [0, 16])
@pytest.mark.parametrize(("columns", "rotation"), [(64, 0), (64, 32), (48, 48)])
def test_operands_are_the_trained_codes(zero_point, scale_dtype, group, columns, rotation):
    for bits, dtype in itertools.product(range(2, 9), DTYPES.values()):
        grid = Grid(
            bits=bits,
            granularity="per_group" if group else "per_token",
            zero_point=zero_point,
            group_size=group or None,
            scale_dtype=scale_dtype,
        )
        spec = LinearSpec(
            in_features=columns,
            out_features=1,
            weight_bits=4,
            activation_bits=bits,
            activation_zero_point=zero_point,
            activation_group_size=group,
            scale_dtype=scale_dtype,
            rotation=rotation,
        )
        x = make_rows(40, columns, seed=bits, dtype=dtype)
        x[0] = 0.0
        x[1] = x[1].abs() + 1
        x[2] = -x[2].abs() - 1
        x[3] *= 1 if dtype == torch.float16 else 1e30
        clips = [torch.rand(40, generator=torch.Generator().manual_seed(seed)) * 0.3 + 0.7 for seed in (1, 2)]
        operand, scale, zero = quantize_activations(x, spec=spec, tensors=LinearTensors(None, *clips))
        rows = hadamard_transform(x, block_size=rotation) if rotation else x.float()
        expected = choose_qparams(rows, grid=grid, clip_low=clips[0][:, None], clip_high=clips[1][:, None])
        assert torch.equal(scale, expected[0])
        assert torch.equal(zero, expected[1])
        codes = quantize(rows, scale=expected[0], zero_point=expected[1], grid=grid)
        codes = codes.float().unflatten(-1, (scale.shape[1], -1))
        assert torch.equal(operand, codes - zero.unsqueeze(-1))
        dequantized = (scale.unsqueeze(-1) * operand).flatten(1)
        assert torch.equal(dequantized, fake_quantize(rows, scale=scale, zero_point=zero, grid=grid))


@pytest.mark.parametrize("arithmetic", ["division", "unrounded"])
@pytest.mark.parametrize(("group", "columns", "rotation"), [(0, 64, 16), (16, 64, 0), (0, 48, 0)])
def test_other_runtimes_arithmetic_is_that_of_training(arithmetic, group, columns, rotation):
    grid = Grid(
        bits=4,
        granularity="per_group" if group else "per_token",
        zero_point="none",
        group_size=group or None,
        scale_dtype="bfloat16",
        arithmetic=arithmetic,
    )
    spec = LinearSpec(
        in_features=columns,
        out_features=1,
        weight_bits=4,
        activation_bits=4,
        activation_zero_point="none",
        activation_group_size=group,
        scale_dtype="bfloat16",
        rotation=rotation,
        rotation_kind="regular",
        activation_arithmetic=arithmetic,
    )
    profile = Profile(name="own", weight=WEIGHT, activation=grid, rotation=rotation, rotation_kind="regular")
    differences = 0
    for dtype in DTYPES.values():
        x = make_rows(40, columns, dtype=dtype)
        x[0] = 0.0
        x[1] *= 0 if dtype == torch.float16 else 1e-20
        operand, scale, _ = quantize_activations(x, spec=spec)
        rows = rotated(x.float(), profile)
        trained_scale, zero = choose_qparams(rows, grid=grid)
        assert torch.equal(scale, dequantizing_scale(trained_scale, grid))
        codes = quantize(rows, scale=trained_scale, zero_point=zero, grid=grid)
        assert torch.equal(operand.flatten(1), codes.float())
        trained = fake_quantize(rows, scale=trained_scale, zero_point=zero, grid=grid)
        assert torch.equal((scale.unsqueeze(-1) * operand).flatten(1), trained)
        assert torch.equal(dequantize(codes, scale=trained_scale, zero_point=zero, grid=grid), trained)
        ours = choose_qparams(rows, grid=replace(grid, arithmetic="reciprocal"))[0]
        differences += int(
            (quantize(rows, scale=ours, zero_point=zero, grid=replace(grid, arithmetic="reciprocal")) != codes).sum()
        )
    assert differences > 0  # another arithmetic gives other codes
