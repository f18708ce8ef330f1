"""The Triton kernels, interpreted on the CPU, against the exact reference: codes, scales, sums and outputs, bit for bit.

The cases are those that the CPU backends are held to, on few rows: the interpreter takes a tenth of a second a program. What
it can't show is the compiled code: test_triton_code.py looks at that. Nothing here ran on a GPU.
"""

import itertools

import pytest
import torch

from qvgen_kernels import LinearTensors, available_kernels, get_backend, packed_linear, resolve_kernel
from qvgen_kernels.hadamard import block_hadamard
from qvgen_kernels.registry import get_backend as backend_of
from qvgen_kernels.triton import backend as triton_backend
from qvgen_kernels.triton.layout import layout_of, named_weight, pack_codes
from qvgen_kernels.triton.quantize_form import WIDEST_TILE
from qvgen_kernels.triton.tiles import Card, Tile, tile_of
from qvgen_kernels.weight import CanonicalWeight
from tests.kernels.cpu_cases import Case, Seeded, compare, draw_case, draw_tail
from tests.kernels.layer import DTYPES, make_layer, make_rows
from tests.kernels.triton_interpreter import _quiet_numpy, gemm, prepacked, quantize, quantized, rotate, run

__all__ = ["_quiet_numpy"]


def check(case):
    """Codes, scales and sums of a case are the reference's, and its outputs."""
    expected = case.expected()
    operand, scale, row_sum = quantized(case)
    compare(case, (operand, scale, expected[2], run(case)), expected)
    if row_sum is not None:
        finite = expected[4]
        sums = expected[0].unflatten(1, (case.layer.spec.num_groups, -1)).sum(-1)
        assert torch.equal(row_sum[finite].float(), sums[finite])


@pytest.mark.parametrize("seed", range(0, 42, 6))
def test_any_layer_and_input(seed):
    check(draw_case(Seeded(seed), seed=seed, columns=(1, 90), rows=(1, 9)))


@pytest.mark.parametrize("weight_zero_point", ["integer", "real", "none"])
def test_all_pairs_of_bits(weight_zero_point):
    """All pairs in these tests together: each kind of zero point meets a third of them, and every width of both sides."""
    turn = ["integer", "real", "none"].index(weight_zero_point)
    for bits in itertools.product(range(2, 9), repeat=2):
        if (bits[0] + bits[1]) % 3 != turn:
            continue
        options = {"weight_bits": bits[0], "activation_bits": bits[1], "weight_zero_point": weight_zero_point}
        zero = ["integer", "none"][bits[0] % 2]
        layer = make_layer(in_features=70, out_features=37, activation_zero_point=zero, **options)
        x = make_rows(5, 70, seed=bits[0] * 8 + bits[1])
        check(Case(layer, x, LinearTensors(bias=layer.bias)))


@pytest.mark.parametrize("weight_bits", [2, 3, 4, 8])
def test_the_integers_are_the_outputs_of_unit_scales(weight_bits):
    """With all scales 1 a float32 output IS its int32 sum: every one of them up to 2^24."""
    layer = make_layer(
        in_features=150, out_features=40, weight_bits=weight_bits, activation_bits=8, activation_range="static"
    )
    layer.scale.fill_(1.0)
    layer.weight[1].fill_(1.0)
    x = torch.randint(-128, 256, (7, 150), generator=torch.Generator().manual_seed(0)).float()
    zeros = torch.tensor([0.0, 255.0, 128.0, 127.0, 1.0, 254.0, 60.0])
    case = Case(layer, x, LinearTensors(row_scale=torch.ones(7), row_zero_point=zeros))
    operand, _, acc, _, _ = case.expected()
    assert torch.equal(quantized(case)[0].float(), operand)
    assert torch.equal(run(case).to(torch.int32), acc[..., 0])
    assert acc.abs().max() < 2**24


@pytest.mark.parametrize("columns", [960, 7680])
def test_largest_sums(columns):
    layer = make_layer(in_features=columns, out_features=17, weight_bits=8, activation_bits=8)
    layer.codes.fill_(255)
    layer.zero_point.zero_()
    layer.planes = (layer.codes,)
    layer.weight = get_backend("reference").prepack(
        layer.planes, scale=layer.scale, zero_point=layer.zero_point, spec=layer.spec
    )
    x = make_rows(5, columns)
    x[:2] = 1.0
    x[2] = -1.0
    case = Case(layer, x)
    assert int(case.expected()[2].max()) == columns * 255 * 255
    check(case)


@pytest.mark.parametrize("groups", [(8, 8), (32, 32), (64, 64), (96, 0), (0, 48), (192, 192), (0, 320)])
@pytest.mark.parametrize("weight_bits", [2, 3, 4, 8])
def test_groups(weight_bits, groups):
    """Fewer fields than a chunk of bytes holds, as many, several chunks, and groups that are padded."""
    columns = {96: 192, 48: 144, 192: 384, 320: 640}.get(max(groups), 3 * max(groups))
    layer = make_layer(
        in_features=columns,
        out_features=20,
        weight_bits=weight_bits,
        activation_bits=8 if weight_bits == 3 else 4,
        weight_group_size=groups[0],
        activation_group_size=groups[1],
        weight_zero_point=["integer", "real", "none"][(weight_bits + max(groups) // 8) % 3],
    )
    x = make_rows(5, columns)
    x[1, 3] = float("nan")
    check(Case(layer, x, LinearTensors(bias=layer.bias)))


SIZES = [2, 64, 12, 96, 20, 28, 1920]
"""Alone and among others each factor that is no power of two: 12, 20, 28, and 60 in 1920."""


@pytest.mark.parametrize(
    ("size", "kind"), [*((s, "sylvester") for s in SIZES), (4, "regular"), (64, "regular"), (256, "regular")]
)
def test_rotations_are_the_contracts_to_the_bit(size, kind):
    layer = make_layer(in_features=size * (2 if size < 1000 else 1), rotation=size, rotation_kind=kind, out_features=3)
    x = make_rows(3, layer.spec.in_features, dtype=torch.bfloat16)
    smoothing = torch.linspace(-2, 3, x.shape[1])
    found = rotate.rotate_rows(x, spec=layer.spec, input_scale=smoothing)
    assert torch.equal(found, block_hadamard(x.float() * smoothing, block=size, kind=kind))
    check(Case(layer, x, LinearTensors(input_scale=smoothing)))


@pytest.mark.parametrize("value", [0.0, 1e-30, 1e30, -3.0, 7.0, float("nan"), float("inf"), -float("inf"), 3e38])
@pytest.mark.parametrize("scale_dtype", ["float32", "float16"])
def test_extreme_rows_change_no_other_row(value, scale_dtype):
    layer = make_layer(in_features=40, out_features=33, weight_bits=4, activation_bits=4, scale_dtype=scale_dtype)
    x = make_rows(5, 40)
    before = run(Case(layer, x))
    x[3, ::2] = value
    x[3, 1::2] = -value if value == 3e38 else value  # a range that is no finite float32
    y = run(Case(layer, x))
    others = [0, 1, 2, 4]
    assert torch.equal(y[others], before[others])
    assert bool(y[3].isnan().all()) == (not abs(value) < 1e38)
    check(Case(layer, x))


@pytest.mark.parametrize("seed", range(6))
def test_gate_and_residual_round_as_separate_operators(seed):
    draw = Seeded(seed)
    rows, outputs, dtype = draw.integers(1, 12), draw.integers(1, 70), list(DTYPES.values())[seed % 3]
    layer = make_layer(out_features=outputs, seed=seed, function=draw.choice(["none", "gelu_tanh", "silu"]))
    x = make_rows(rows, 24, seed=seed, dtype=dtype)
    tail = draw_tail(draw, rows, outputs, dtype, seed)
    expected = run(Case(layer, x, LinearTensors(bias=layer.bias)))
    if tail["gate"] is not None:
        expected = expected * tail["gate"].repeat_interleave(rows // len(tail["gate"]), 0)
    if tail["residual"] is not None:
        expected = tail["residual"].to(expected.dtype) + expected
    y = run(Case(layer, x, LinearTensors(bias=layer.bias, **tail)))
    assert torch.equal(y.nan_to_num(), expected.to(dtype).nan_to_num())


@pytest.mark.parametrize("function", ["gelu_tanh", "silu"])
@pytest.mark.parametrize("dtype", list(DTYPES.values()))
def test_functions_are_those_of_the_cpu_backends(function, dtype):
    layer = make_layer(out_features=40, function=function)
    others = [name for name in available_kernels(layer.spec) if name != "reference"]
    if not others:
        pytest.skip("no C++ compiler")
    x = make_rows(9, 24, dtype=dtype)
    weight = backend_of(others[0]).prepack(
        layer.planes, scale=layer.scale, zero_point=layer.zero_point, spec=layer.spec
    )
    expected = packed_linear(x, weight=weight, spec=layer.spec, kernel=others[0])
    assert torch.equal(run(Case(layer, x)).nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize("tile", [Tile(16, 16, 4, 2, 1), Tile(64, 32, 4, 3), Tile(128, 16, 8, 4, 2)])
def test_tiles_change_nothing_and_write_nowhere_else(tile):
    layer = make_layer(in_features=100, out_features=70, weight_bits=3, activation_bits=8)
    x = make_rows(35, 100)
    operands = quantize.quantize_rows(x, spec=layer.spec, tensors=LinearTensors())
    around = torch.full((37, 70), 123.0)
    gemm.multiply(
        operands,
        named_weight(prepacked(layer), spec=layer.spec),
        y=around[1:36],
        branch=None,
        tensors=LinearTensors(bias=layer.bias),
        spec=layer.spec,
        tile=tile,
    )
    assert torch.equal(around[1:36], layer(x))
    assert bool((around[[0, 36]] == 123.0).all())


@pytest.mark.parametrize("bits", range(2, 9))
def test_bytes_are_what_the_layout_says(bits):
    layer = make_layer(in_features=200, out_features=6, weight_bits=bits, activation_bits=4)
    layout = layout_of(layer.spec)
    packed = pack_codes(layer.codes, layout=layout).view(torch.uint8).int()
    assert packed.shape == (6, layout.chunks * layout.chunk_bytes)
    for n, k in itertools.product(range(6), range(200)):
        chunk, rest = divmod(k, layout.fields * layout.width)
        field, j = divmod(rest, layout.width)
        own = packed[n, chunk * layout.chunk_bytes : (chunk + 1) * layout.chunk_bytes]
        if bits == 3:
            low = own[field // 4 * layout.width + j] >> 2 * (field % 4) & 3
            code = (low | (own[2 * layout.width + j] >> field & 1) << 2) ^ 4
        elif bits < 5:
            code = (own[j] >> bits * field & (1 << bits) - 1) ^ 1 << bits - 1
        else:
            code = (own[j] + (1 << bits - 1)) & 255
        assert code == layer.codes[n, k]


def test_bytes_of_a_weight_in_memory():
    for bits, per_weight in ((2, 0.25), (3, 0.375), (4, 0.5), (8, 1.0)):
        for columns in (1536, 3072, 5120, 8960, 13824):
            layout = layout_of(make_layer(in_features=columns, out_features=1, weight_bits=bits).spec)
            assert layout.chunks * layout.chunk_bytes == per_weight * columns
        layout = layout_of(make_layer(in_features=1920, out_features=1, weight_bits=bits).spec)
        assert layout.chunks * layout.chunk_bytes <= per_weight * 1920 * 1.07


@pytest.mark.parametrize("zero_point", ["integer", "real", "none"])
def test_merged_layers_are_one(zero_point):
    parts = [make_layer(out_features=n, seed=n, weight_zero_point=zero_point, activation_bits=8) for n in (5, 9)]
    whole = make_layer(out_features=14, weight_zero_point=zero_point, activation_bits=8)
    canonical = [CanonicalWeight(part.planes, part.scale, part.zero_point) for part in parts]
    weight = get_backend("triton").prepack_parts(canonical, spec=whole.spec)
    x = make_rows(4, 24)
    y = packed_linear(x, weight=weight, spec=whole.spec, kernel="triton")
    assert torch.equal(y, torch.cat([run(Case(part, x)) for part in parts], 1))


def test_no_rows_and_any_leading_sizes():
    layer = make_layer()
    weight = prepacked(layer)
    y = packed_linear(torch.empty(0, 24, dtype=torch.bfloat16), weight=weight, spec=layer.spec, kernel="triton")
    assert (y.shape, y.dtype) == ((0, 7), torch.bfloat16)
    x = make_rows(6, 24)
    y = packed_linear(x.view(2, 3, 24), weight=weight, spec=layer.spec, kernel="triton")
    assert torch.equal(y.flatten(0, 1), run(Case(layer, x)))


def test_a_weight_of_another_layer_or_precision_is_refused():
    layer = make_layer()
    weight = prepacked(layer)
    with pytest.raises(ValueError, match=r"weight is torch.int8 \[7, 96\].*returned for \[9, 24\]"):
        packed_linear(make_rows(2, 24), weight=weight, spec=make_layer(out_features=9).spec, kernel="triton")
    weight[1] = weight[1].bfloat16()
    with pytest.raises(ValueError, match="torch.bfloat16 scales"):
        packed_linear(make_rows(2, 24), weight=weight, spec=layer.spec, kernel="triton")


def test_parts_of_a_prepack_own_their_memory():
    layer = make_layer(weight_bits=8, weight_zero_point="real")
    before = [tensor.clone() for tensor in prepacked(layer)]
    made = prepacked(layer)
    layer.planes[0].zero_()
    layer.scale.zero_()
    layer.zero_point.zero_()
    assert all(torch.equal(a, b) for a, b in zip(made, before, strict=True))


@pytest.fixture
def _fresh_answers():
    """No remembered answer about this machine, before or after."""
    for known in (triton_backend._missing, triton_backend._card):
        known.cache_clear()
    yield
    for known in (triton_backend._missing, triton_backend._card):
        known.cache_clear()


def card(monkeypatch, capability, name="NVIDIA A card"):
    """Let torch see a card, as far as a refusal asks."""
    found = type("Properties", (), {"multi_processor_count": 100, "name": name})()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)


@pytest.mark.usefixtures("_fresh_answers")
def test_refusals_name_what_is_missing(monkeypatch):
    backend, layer = get_backend("triton"), make_layer()
    cuda = torch.device("cuda", 0)
    assert "runs on CUDA and ROCm devices, not on cpu" in backend.refusal(layer.spec, device=torch.device("cpu"))
    if not torch.cuda.is_available():
        assert "torch finds no GPU" in backend.refusal(layer.spec, device=cuda)
    triton_backend._missing.cache_clear()
    card(monkeypatch, (7, 5), "Tesla T4")
    assert backend.refusal(layer.spec, device=cuda) == "Tesla T4 has compute capability 7.5; it must be 8.0 or higher"
    triton_backend._card.cache_clear()
    card(monkeypatch, (9, 0))
    assert "there is no cuda:3: torch finds 1 GPUs" in backend.refusal(layer.spec, device=torch.device("cuda", 3))
    assert backend.refusal(layer.spec, device=cuda) is None
    assert available_kernels(layer.spec, device=cuda)[0] == "triton"
    assert resolve_kernel("auto", layer.spec, device=cuda).name == "triton"
    turned = make_layer(in_features=32768, out_features=1, rotation=32768).spec
    assert "runs of 32768 columns" in backend.refusal(turned, device=cuda)


@pytest.mark.usefixtures("_fresh_answers")
def test_without_triton_the_refusal_says_so(monkeypatch):
    card(monkeypatch, (9, 0))
    monkeypatch.setattr(triton_backend.importlib.util, "find_spec", lambda name: None)
    spec, cuda = make_layer().spec, torch.device("cuda", 0)
    assert "Triton is not installed" in get_backend("triton").refusal(spec, device=cuda)
    assert resolve_kernel("auto", spec, device=cuda).name == "dequantize"


def test_sums_that_could_leave_int32_on_the_way_are_refused():
    spec = make_layer(in_features=131072, out_features=1, weight_bits=4, activation_bits=4).spec
    assert "could sum to more than int32 holds on the way" in triton_backend._layer_refusal(spec)
    assert triton_backend._layer_refusal(make_layer(in_features=131071, out_features=1).spec) is None


def test_tiles_follow_the_rule():
    spec = make_layer(in_features=1920, out_features=1920, weight_bits=4, activation_bits=4).spec
    hopper, ada = Card((9, 0), 132), Card((8, 9), 128)
    assert tile_of(spec, rows=17776, card=hopper) == Tile(128, 256, 8, 4)
    assert tile_of(spec, rows=17776, card=ada) == Tile(128, 128, 8, 4)
    assert tile_of(spec, rows=17776, card=Card((12, 1), 48)) == tile_of(spec, rows=17776, card=Card((12, 0), 48))
    assert tile_of(spec, rows=17776, card=hopper, tail=True).rows == 128
    small = tile_of(spec, rows=20, card=hopper)
    assert (small.outputs, small.rows) == (64, 32)
    grouped = make_layer(in_features=1920, out_features=1920, weight_group_size=64, activation_group_size=64).spec
    assert tile_of(grouped, rows=17776, card=hopper).rows == 64
    for bits, rows in itertools.product((2, 3, 4, 8), (1, 100, 4096)):
        for capability in ((0, 0), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)):
            layer = make_layer(in_features=1920, out_features=300, weight_bits=bits, activation_bits=4)
            tile = tile_of(layer.spec, rows=rows, card=Card(capability, 80))
            assert WIDEST_TILE % tile.rows == 0
            assert 2 <= tile.stages <= 4
