"""Outputs and integer sums of the kernels, held to the exact reference; everything twice, with different data.

    random       layers of any grid, as the CPU backends are tested with (tests/kernels/cpu_cases.py)
    pairs        all pairs of bits: with scales of 1 a float32 output is its int32 sum
    adversarial  zero, tiny, huge and damaged rows, the largest sums, one row, one column
    real         the models' layers at their token counts; rows are independent, so some rows are compared

The reference of the first three runs on the CPU, that of the last on the card, in float64. Every call is made twice: a
result that moves is a race.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from gpu.layer import Canonical
from gpu.setting import WIDTHS, Case, Row, Setting
from qvgen_kernels import LinearSpec, LinearTensors, get_backend, packed_linear
from qvgen_kernels.reference import accumulate, quantize_activations
from tests.kernels.cpu_cases import Case as Call
from tests.kernels.cpu_cases import Seeded, compare, draw_case
from tests.kernels.layer import make_layer, make_rows

EXTREMES = (0.0, 1e-30, 1e30, -3.0, 7.0, float("nan"), float("inf"), -float("inf"), 3e38)
SEEDS = (0, 1000)
"""First seed of each of the two passes over everything."""


def cases(setting: Setting, *, warm: bool = False) -> Iterator[Case]:
    """All cases, those that matter most first; the second pass has the same layers with other data, and compiles nothing."""
    few = setting.rehearse
    shapes = sorted(
        {(layer.rows, layer.columns, layer.outputs) for model in setting.models() for layer in model.layers}
    )
    for first in SEEDS[: 1 if warm or few else 2]:
        for shape, bits in itertools.product(shapes[:1] if few else shapes, WIDTHS[2:] if few else WIDTHS):
            name = f"real {'x'.join(map(str, shape))} w{bits[0]}a{bits[1]} {first}"
            yield name, partial(_real, setting, shape, bits, first)
        for bits in [(3, 8)] if few else itertools.product(range(2, 9), repeat=2):
            yield f"pair w{bits[0]}a{bits[1]} {first}", partial(_pair, setting, bits, first)
        for value in EXTREMES[5:6] if few else EXTREMES:
            yield f"row of {value} {first}", partial(_extreme, setting, value, first)
        yield f"largest sums {first}", partial(_largest, setting)
        yield f"smallest layers {first}", partial(_smallest, setting, first)
        for seed in range(1 if few else 60):
            yield f"random {seed} {first}", partial(_random, setting, seed, first)


def _outputs(call: Call, kernel: str, setting: Setting) -> tuple[Tensor, bool]:
    """The outputs of a kernel, on the CPU, and whether a second call gives the same bytes."""
    layer, device = call.layer, setting.device
    zero = None if layer.zero_point is None else layer.zero_point.to(device)
    planes = [plane.to(device) for plane in layer.planes]
    weight = get_backend(kernel).prepack(planes, scale=layer.scale.to(device), zero_point=zero, spec=layer.spec)
    given = LinearTensors(*(None if value is None else _moved(value, device) for value in call.tensors))
    x = _moved(call.x, device)
    found = [packed_linear(x, weight=weight, tensors=given, spec=layer.spec, kernel=kernel).cpu() for _ in range(2)]
    return found[0], _same_bytes(*found)


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device, with its strides where there is another device."""
    if tensor.device == device:
        return tensor
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device).copy_(tensor)


def _same_bytes(first: Tensor, second: Tensor) -> bool:
    return torch.equal(first.contiguous().view(torch.uint8), second.contiguous().view(torch.uint8))


def _check(call: Call, setting: Setting) -> Iterator[Row]:
    """One row for every kernel: equal to the reference as far as the contract says, and twice the same."""
    expected = call.expected()
    for kernel in setting.kernels(call.layer.spec):
        found, steady = _outputs(call, kernel, setting)
        try:
            compare(call, (*expected[:3], found), expected)
        except AssertionError:
            off = int((found != expected[3])[expected[4]].sum())
            yield {"kernel": kernel, "equal": False, "steady": steady, "differ": off, "of": found.numel()}
        else:
            yield {"kernel": kernel, "equal": True, "steady": steady}


def _random(setting: Setting, seed: int, data: int) -> Iterator[Row]:
    limits = {"columns": (1, 60), "rows": (1, 6)} if setting.rehearse else {"columns": (1, 700), "rows": (1, 200)}
    yield from _check(draw_case(Seeded(seed), seed=seed + data, **limits), setting)


def _pair(setting: Setting, bits: tuple[int, int], seed: int) -> Iterator[Row]:
    rows, columns, outputs = (5, 70, 20) if setting.rehearse else (150, 200, 300)
    options = {"in_features": columns, "out_features": outputs, "weight_bits": bits[0], "activation_bits": bits[1]}
    layer = make_layer(seed=seed, activation_range="static", **options)
    layer.scale.fill_(1.0)
    layer.weight[1].fill_(1.0)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-300, 300, (rows, columns), generator=generator).float()
    zero = torch.randint(0, 2 ** bits[1], (rows,), generator=generator).float()
    call = Call(layer, x, LinearTensors(row_scale=torch.ones(rows), row_zero_point=zero))
    operand, _, _ = quantize_activations(x, spec=layer.spec, tensors=call.tensors)
    sums = accumulate(operand, layer.weight, spec=layer.spec)[..., 0]
    for kernel in setting.kernels(layer.spec):
        found, steady = _outputs(call, kernel, setting)
        equal = torch.equal(found.to(torch.int32), sums)
        yield {"kernel": kernel, "equal": equal, "steady": steady, "what": "sums"}
    dynamic = make_layer(seed=seed, **options)
    yield from _check(Call(dynamic, make_rows(rows, columns, seed=seed), LinearTensors(bias=dynamic.bias)), setting)


def _extreme(setting: Setting, value: float, seed: int) -> Iterator[Row]:
    layer = make_layer(in_features=40, out_features=33, weight_bits=4, activation_bits=4, seed=seed)
    x = make_rows(5, 40, seed=seed)
    before = {kernel: _outputs(Call(layer, x), kernel, setting)[0] for kernel in setting.kernels(layer.spec)}
    x[3, ::2] = value
    x[3, 1::2] = -value if value == 3e38 else value  # a range that is no finite float32
    yield from _check(Call(layer, x), setting)
    others = [0, 1, 2, 4]
    for kernel, y in before.items():
        found, steady = _outputs(Call(layer, x), kernel, setting)
        equal = torch.equal(found[others], y[others])
        yield {"kernel": kernel, "equal": equal, "steady": steady, "what": "the other rows"}


def _largest(setting: Setting) -> Iterator[Row]:
    layer = make_layer(in_features=960, out_features=17, weight_bits=8, activation_bits=8)
    layer.codes.fill_(255)
    layer.zero_point.zero_()
    layer.planes = (layer.codes,)
    layer.weight = get_backend("reference").prepack(
        layer.planes, scale=layer.scale, zero_point=layer.zero_point, spec=layer.spec
    )
    x = make_rows(5, 960)
    x[:2], x[2] = 1.0, -1.0
    yield from _check(Call(layer, x), setting)


def _smallest(setting: Setting, seed: int) -> Iterator[Row]:
    sizes = ((1, 1, 1), (65, 1, 1), (33, 129, 1), (1, 65, 257))
    for columns, outputs, rows in sizes[:1] if setting.rehearse else sizes:
        layer = make_layer(in_features=columns, out_features=outputs, seed=seed)
        yield from _check(Call(layer, make_rows(rows, columns, seed=seed), LinearTensors(bias=layer.bias)), setting)


def _real(setting: Setting, shape: tuple[int, int, int], bits: tuple[int, int], seed: int) -> Iterator[Row]:
    rows, columns, outputs = shape
    device = setting.device
    spec = LinearSpec(in_features=columns, out_features=outputs, weight_bits=bits[0], activation_bits=bits[1])
    layer = Canonical.random(spec, device=device, seed=seed)
    generator = torch.Generator(device).manual_seed(seed)
    x = torch.randn(rows, columns, device=device, generator=generator, dtype=torch.bfloat16)
    bias = torch.randn(outputs, device=device, generator=generator)
    some = torch.unique(torch.cat([torch.arange(0, 40), torch.randint(0, rows, (200,)), torch.arange(rows - 40, rows)]))
    some = some[(some >= 0) & (some < rows)].to(device)
    expected = layer.packed("reference")(x[some], bias=bias)
    for kernel in setting.kernels(spec):
        packed = layer.packed(kernel)
        y = packed(x, bias=bias)
        steady = _same_bytes(y, packed(x, bias=bias))
        off = int((y[some] != expected).sum())
        yield {"kernel": kernel, "equal": off == 0, "steady": steady, "differ": off, "of": expected.numel()}
