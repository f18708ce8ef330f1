"""The CPU backends against the exact reference: operands, scales, accumulators and outputs, bit for bit.

Every backend that this machine runs is tested here; the tile code (AMX) with emulated tiles and NEON under an emulator are in
test_cpu_sanitizers.py and test_cpu_arm.py.
"""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qvgen_kernels import LinearTensors, available_kernels, cpu, get_backend, packed_linear, resolve_kernel
from qvgen_kernels.cpu_library import BACKENDS, missing_reason, supported
from tests.kernels.cpu_cases import KERNEL_OF, Case, compare, draw_case, probe
from tests.kernels.layer import DTYPES, as64, make_layer, make_rows

pytestmark = pytest.mark.skipif(missing_reason() is not None, reason=f"no CPU library: {missing_reason()}")
VARIANTS = [name for name in BACKENDS if missing_reason() is None and supported(name) is None]


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


class Drawn:
    """The drawing interface of cpu_cases on hypothesis."""

    def __init__(self, data):
        self.data = data

    def integers(self, low, high):
        return self.data.draw(st.integers(low, high))

    def choice(self, values):
        return self.data.draw(st.sampled_from(values))


@given(st.data())
@settings(max_examples=60)
def test_any_layer_and_input(data):
    case = draw_case(Drawn(data), seed=data.draw(st.integers(0, 1000)))
    expected = case.expected()
    found = [probe(case, variant) for variant in VARIANTS]
    for result in found:
        compare(case, result, expected)
        if not case.layer.spec.branch_rank:
            assert torch.equal(
                result[3].nan_to_num(), found[0][3].nan_to_num()
            )  # also of functions: one source for all


@pytest.mark.parametrize("weight_zero_point", ["integer", "real", "none"])
@pytest.mark.parametrize("activation_zero_point", ["integer", "none"])
def test_all_pairs_of_bits(weight_zero_point, activation_zero_point):
    for bits in itertools.product(range(2, 9), repeat=2):
        layer = make_layer(
            in_features=70,
            out_features=37,
            weight_bits=bits[0],
            activation_bits=bits[1],
            weight_zero_point=weight_zero_point,
            activation_zero_point=activation_zero_point,
        )
        case = Case(layer, make_rows(9, 70, seed=bits[0] * 8 + bits[1]), LinearTensors(bias=layer.bias))
        expected = case.expected()
        for variant in VARIANTS:
            compare(case, probe(case, variant), expected)


@pytest.mark.parametrize("columns", [960, 1920, 2000, 7680])
def test_long_rows(columns):
    # the largest sums: all codes at their ends, signs alike; and lengths that are cut into pieces
    layer = make_layer(
        in_features=columns, out_features=33, weight_bits=8, activation_bits=8, weight_zero_point="integer"
    )
    layer.codes.fill_(255)
    layer.zero_point.zero_()
    layer.planes = (layer.codes,)
    layer.weight = get_backend("reference").prepack(
        layer.planes, scale=layer.scale, zero_point=layer.zero_point, spec=layer.spec
    )
    x = make_rows(13, columns)
    x[:4] = 1.0
    case = Case(layer, x)
    expected = case.expected()
    assert int(expected[2].max()) == columns * 255 * 255
    for variant in VARIANTS:
        compare(case, probe(case, variant), expected)


@pytest.mark.parametrize("rotation", [2, 8, 12, 24, 48, 96, 1920])
def test_rotations_of_every_vector_length(rotation):
    layer = make_layer(in_features=1920, out_features=5, weight_bits=4, activation_bits=8, rotation=rotation)
    case = Case(layer, make_rows(5, 1920))
    expected = case.expected()
    for variant in VARIANTS:
        compare(case, probe(case, variant), expected)


@pytest.mark.parametrize("value", [0.0, 1e-30, 1e30, -3.0, 7.0, float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_rows_change_no_other_row(value, dtype):
    layer = make_layer(in_features=40, out_features=33, weight_bits=4, activation_bits=4)
    x = make_rows(7, 40).to(dtype)
    for variant in VARIANTS:
        name = KERNEL_OF[variant]
        weight = get_backend(name).prepack(
            layer.planes, scale=layer.scale, zero_point=layer.zero_point, spec=layer.spec
        )
        before = packed_linear(x, weight=weight, tensors=LinearTensors(bias=layer.bias), spec=layer.spec, kernel=name)
        changed = x.clone()
        changed[3] = value
        y = packed_linear(changed, weight=weight, tensors=LinearTensors(bias=layer.bias), spec=layer.spec, kernel=name)
        others = [0, 1, 2, 4, 5, 6]
        assert torch.equal(y[others], before[others])
        expected = packed_linear(
            changed, weight=layer.weight, tensors=LinearTensors(bias=layer.bias), spec=layer.spec, kernel="reference"
        )
        assert torch.equal(y.isnan(), expected.isnan())
        assert bool(y[3].isnan().all()) == (not torch.tensor(value).isfinite())
        compare(Case(layer, changed), probe(Case(layer, changed), variant))


@pytest.mark.parametrize("weight_zero_point", ["integer", "real"])
def test_bfloat16_outputs_are_the_rounded_exact_ones(weight_zero_point):
    # float32 rounds three times before the cast: next to a tie of bfloat16 that decides otherwise, 3 * 2^-17 of the outputs
    layer = make_layer(
        in_features=1920, out_features=512, weight_bits=4, activation_bits=4, weight_zero_point=weight_zero_point
    )
    x = torch.randn(256, 1920, generator=torch.Generator().manual_seed(0)).bfloat16()
    case = Case(layer, x, LinearTensors(bias=layer.bias))
    operand, scale, acc, _, _ = case.expected()
    total = as64(operand.sum(1, keepdim=True, dtype=torch.float64))
    zero = as64(layer.zero_point)[None] * total if weight_zero_point == "real" else 0
    exact = (as64(acc[..., 0]) - zero) * as64(scale) * as64(layer.scale)[None] + as64(layer.bias)[None]
    nearest = torch.from_numpy(exact).to(torch.bfloat16)
    for variant in VARIANTS:
        y = probe(case, variant)[3]
        different = y != nearest
        assert different.float().mean() <= 1e-4
        if weight_zero_point == "real":
            continue  # the subtraction cancels: where it does, float32 leaves less than bfloat16 could hold
        steps = y[different].view(torch.int16).int() - nearest[different].view(torch.int16).int()
        assert bool((steps.abs() <= 1).all())


def test_threads_change_nothing(threads):
    for rows, columns, outputs in ((1, 64, 200), (70, 96, 33), (700, 1920, 64)):
        layer = make_layer(in_features=columns, out_features=outputs, weight_bits=4, activation_bits=4)
        x = make_rows(rows, columns, dtype=torch.bfloat16)
        for name in {KERNEL_OF[variant] for variant in VARIANTS}:
            weight = get_backend(name).prepack(
                layer.planes, scale=layer.scale, zero_point=layer.zero_point, spec=layer.spec
            )
            outputs_by_threads = []
            for count in (1, 2, 3):
                threads(count)
                outputs_by_threads.append(
                    packed_linear(
                        x, weight=weight, tensors=LinearTensors(bias=layer.bias), spec=layer.spec, kernel=name
                    )
                )
            assert torch.equal(outputs_by_threads[0], outputs_by_threads[1])
            assert torch.equal(outputs_by_threads[0], outputs_by_threads[2])


@pytest.mark.parametrize("dtype", list(DTYPES.values()))
def test_no_rows(dtype):
    layer = make_layer()
    for name in {KERNEL_OF[variant] for variant in VARIANTS}:
        weight = get_backend(name).prepack(
            layer.planes, scale=layer.scale, zero_point=layer.zero_point, spec=layer.spec
        )
        y = packed_linear(torch.empty(0, 24, dtype=dtype), weight=weight, spec=layer.spec, kernel=name)
        assert (y.shape, y.dtype) == ((0, 7), dtype)


def test_float16_conversions_are_those_of_torch():
    # one column, weight 1 * scale, all 65536 inputs: a row is its own maximum, so the operator is nearly the identity
    bits = torch.arange(65536, dtype=torch.int32).to(torch.int16)
    layer = make_layer(in_features=1, out_features=1, weight_bits=8, activation_bits=8, activation_zero_point="none")
    x = bits.view(torch.float16)[:, None]
    case = Case(layer, x)
    expected = case.expected()
    for variant in VARIANTS:
        compare(case, probe(case, variant), expected)


def test_auto_takes_the_best_backend_and_an_explicit_one_never_falls_back():
    spec = make_layer().spec
    names = available_kernels(spec)
    assert resolve_kernel("auto", spec).name == names[0] != "reference"
    assert names[-3:] == ["portable", "reference", "dequantize"]  # what is slow, then what is not exact
    for name in ("amx", "vnni", "avx2", "neon", "portable"):
        if name in names:
            assert resolve_kernel(name, spec).name == name
        else:
            with pytest.raises(RuntimeError, match=f"kernel='{name}' can't run this layer on cpu: .*use kernel=auto"):
                resolve_kernel(name, spec)
    with pytest.raises(RuntimeError, match="runs on the CPU, not on cuda"):
        resolve_kernel("portable", spec, device="cuda")


def test_a_weight_of_another_layer_or_precision_is_refused():
    layer = make_layer()
    backend = get_backend("portable")
    weight = backend.prepack(layer.planes, scale=layer.scale, zero_point=layer.zero_point, spec=layer.spec)
    with pytest.raises(ValueError, match=r"weight is torch.int8 .*must be what prepack returned for \[7, 32\]"):
        packed_linear(make_rows(2, 32), weight=weight, spec=make_layer(in_features=32).spec, kernel="portable")
    weight[2] = weight[2].bfloat16()
    with pytest.raises(ValueError, match="torch.bfloat16 scales"):
        packed_linear(make_rows(2, 24), weight=weight, spec=layer.spec, kernel="portable")


def test_the_default_device_is_of_no_concern():
    layer = make_layer(in_features=48, rotation=24)
    name, x = resolve_kernel("auto", layer.spec).name, make_rows(3, 48)
    cpu._paley_terms.cache_clear()
    cpu._template.cache_clear()
    with torch.device("meta"):
        weight = get_backend(name).prepack(
            layer.planes, scale=layer.scale, zero_point=layer.zero_point, spec=layer.spec
        )
        y = packed_linear(x, weight=weight, tensors=LinearTensors(bias=layer.bias), spec=layer.spec, kernel=name)
    assert torch.equal(y, layer(x))


def test_compiles_without_graph_break():
    layer = make_layer()
    name = resolve_kernel("auto", layer.spec).name
    weight = get_backend(name).prepack(layer.planes, scale=layer.scale, zero_point=layer.zero_point, spec=layer.spec)

    def block(x):
        return (
            torch.relu(
                packed_linear(
                    x * 2, weight=weight, tensors=LinearTensors(bias=layer.bias), spec=layer.spec, kernel=name
                )
            )
            + 1
        )

    x = make_rows(10, 24).view(2, 5, 24)
    assert torch.equal(torch.compile(block, fullgraph=True, backend="aot_eager")(x), block(x))
    torch._dynamo.reset()
