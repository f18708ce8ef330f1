"""Function, gate and residual of the epilogue: float64 oracle, torch's separate operators, and the two blocks that use them.

A backend may differ from the exact function by a rounding of x's type and 2^-22 of the input; product and sum with
gate and residual are exactly those of separate operators, on the backend's own values of the function.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from qvgen_kernels import LinearTensors, available_kernels, get_backend, packed_linear
from tests.kernels import oracle
from tests.kernels.cpu_cases import draw_tail
from tests.kernels.layer import DTYPES, as64, make_layer, make_rows
from tests.kernels.test_cpu import Drawn

KERNELS = [name for name in available_kernels(make_layer().spec) if name != "dequantize"]  # that one is not exact
FUNCTIONS = ["none", "gelu_tanh", "silu"]


def run(layer, x, name, **tensors):
    weight = get_backend(name).prepack(layer.planes, scale=layer.scale, zero_point=layer.zero_point, spec=layer.spec)
    given_tensors = LinearTensors(bias=layer.bias, **tensors)
    return packed_linear(x, weight=weight, tensors=given_tensors, spec=layer.spec, kernel=name)


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_reference_is_the_oracle(dtype, function):
    layer = make_layer(function=function)
    x = make_rows(12, 24).clamp(-500, 500).to(DTYPES[dtype])  # nothing leaves float16
    gates = {name: make_rows(3, 7, seed=1).clamp(-4, 4).to(DTYPES[name]) for name in dict.fromkeys(("float32", dtype))}
    residual = make_rows(12, 7, seed=3, dtype=DTYPES[dtype])
    before = layer.oracle(x)[1]
    plain = oracle.round_to(before, dtype)
    for gate_dtype, gate in [(dtype, None), *gates.items()]:
        for r in (None, residual):
            y = as64(run(layer, x, "reference", gate=gate, residual=r))
            expected = oracle.finish(
                before,
                dtype=dtype,
                function=function,
                gate=None if gate is None else as64(gate),
                gate_dtype=gate_dtype,
                residual=None if r is None else as64(r),
            )
            if function == "none":
                assert (y == expected).all()
                continue
            factor = 1.0 if gate is None else abs(as64(gate)).repeat(4, 0)
            after = abs(oracle.function_of(function, plain))
            eps = torch.finfo(DTYPES[dtype]).eps
            bound = (2 * eps * after + 2.0**-22 * abs(plain)) * factor + eps * (0.0 if r is None else abs(as64(r)))
            assert (abs(y - expected) <= bound + torch.finfo(DTYPES[dtype]).tiny).all()


@pytest.mark.parametrize("name", KERNELS)
@given(st.data())
@settings(max_examples=25)
def test_gate_and_residual_round_as_separate_operators(name, data):
    draw = Drawn(data)
    rows, outputs = draw.integers(1, 40), draw.integers(1, 70)
    dtype, seed = DTYPES[draw.choice(list(DTYPES))], draw.integers(0, 99)
    function, groups = draw.choice(FUNCTIONS), draw.choice([0, 8])
    layer = make_layer(out_features=outputs, seed=seed, function=function, weight_group_size=groups)
    x = make_rows(rows, 24, seed=seed, dtype=dtype)
    tail = draw_tail(draw, rows, outputs, dtype, seed)
    after = run(layer, x, name)
    expected = after
    if tail["gate"] is not None:
        expected = expected * tail["gate"].repeat_interleave(rows // len(tail["gate"]), 0)
    if tail["residual"] is not None:
        expected = tail["residual"].to(expected.dtype) + expected
    y = run(layer, x, name, **tail)
    if name == "reference" and function != "none":
        # torch's own function may round otherwise at another place in memory
        assert torch.allclose(y, expected.to(dtype), rtol=4 * torch.finfo(dtype).eps, atol=1e-2, equal_nan=True)
    else:
        assert torch.equal(y.nan_to_num(), expected.to(dtype).nan_to_num())


def every_number(dtype):
    """All numbers of a 16-bit type below 1e36, and for float32 a million from -100 to 100."""
    if dtype == torch.float32:
        return torch.linspace(-100, 100, 2**20)[:, None]
    x = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    return x[x.isfinite() & (x.abs() < 1e36)][:, None]


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("function", FUNCTIONS[1:])
def test_functions_are_within_a_rounding_of_the_exact_ones(dtype, function):
    # one column of weight 1 by symmetric 8 bits: a row is its own range, so the linear is nearly the identity
    options = {"weight_bits": 8, "activation_bits": 8, "weight_zero_point": "none", "activation_zero_point": "none"}
    layer = make_layer(in_features=1, out_features=1, function=function, **options)
    plain = make_layer(in_features=1, out_features=1, **options)
    for part in (layer, plain):
        part.codes.fill_(255)
        part.planes = (part.codes,)
        part.scale.fill_(1 / 127)
        part.bias.zero_()
    x = every_number(DTYPES[dtype])
    found = {}
    for name in KERNELS:
        before, y = run(plain, x, name), run(layer, x, name)
        exact = oracle.function_of(function, as64(before))
        ulp = torch.finfo(DTYPES[dtype]).eps * abs(exact) + torch.finfo(DTYPES[dtype]).tiny
        error = abs(as64(y) - exact)
        assert (error <= ulp + 2.0**-22 * abs(as64(before))).all()
        rounded = oracle.round_to(exact, dtype)
        if dtype != "float32" and name != "reference":
            assert (as64(y) != rounded)[abs(exact) > 1e-30].mean() < 1e-3
        found[name] = y
    others = [y for name, y in found.items() if name != "reference"]
    assert all(torch.equal(others[0], other) for other in others)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("dtype", list(DTYPES.values()))
def test_what_the_transformer_blocks_compute(name, dtype):
    layer = make_layer(out_features=50)
    x, hidden = (make_rows(2 * 9, columns, seed=columns).to(dtype).view(2, 9, columns) for columns in (24, 50))
    six = make_rows(2, 300, seed=5)
    out = run(layer, x, name)
    gate = six.to(dtype).chunk(6, dim=1)[2]  # CogVideoXLayerNormZero
    y = run(layer, x, name, gate=gate, residual=hidden.flatten(0, 1))
    assert torch.equal(y, hidden + gate[:, None, :] * out)
    gate = six.view(2, 6, 50).chunk(6, dim=1)[2]  # WanTransformerBlock
    y = run(layer, x, name, gate=gate.squeeze(1), residual=hidden.flatten(0, 1))
    assert torch.equal(y, (hidden.float() + out * gate).type_as(hidden))
    assert torch.equal(run(layer, x, name, residual=hidden.flatten(0, 1)), hidden + out)


@pytest.mark.parametrize("name", KERNELS)
def test_no_rows_and_rows_that_are_not_finite(name):
    layer = make_layer(function="gelu_tanh")
    tail = {"gate": torch.ones(0, 7), "residual": torch.ones(0, 7)}
    assert run(layer, torch.empty(0, 24), name, **tail).shape == (0, 7)
    tail = {"gate": torch.ones(1, 7), "residual": torch.ones(3, 7)}
    x = make_rows(3, 24)
    before = run(layer, x, name, **tail)
    x[1, 3] = float("nan")
    y = run(layer, x, name, **tail)
    assert y[1].isnan().all()
    assert torch.equal(y[[0, 2]], before[[0, 2]])


def test_functions_of_infinite_outputs_are_those_of_torch():
    layer = make_layer(out_features=2, function="gelu_tanh")
    x = make_rows(2, 24)
    for bias in (float("inf"), -float("inf")):
        layer.bias.fill_(bias)
        for function, of_torch in (
            ("gelu_tanh", lambda v: functional.gelu(v, approximate="tanh")),
            ("silu", functional.silu),
        ):
            layer = make_layer(out_features=2, function=function)
            layer.bias.fill_(bias)
            expected = of_torch(torch.full((2, 2), bias))
            for name in KERNELS:
                assert torch.equal(run(layer, x, name).nan_to_num(), expected.nan_to_num())
