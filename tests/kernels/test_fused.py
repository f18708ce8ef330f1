"""The feed-forward in one call against two calls, and merged layers against their parts: the same bits."""

import pytest
import torch
from torch.nn import functional

from qvgen_kernels import LinearTensors, available_kernels, get_backend, packed_linear
from qvgen_kernels.fused import Canonical, merge_linears, packed_feed_forward
from tests.kernels.layer import DTYPES, make_layer, make_rows

KERNELS = available_kernels(make_layer().spec)


def prepacked(layer, name):
    return get_backend(name).prepack(layer.planes, scale=layer.scale, zero_point=layer.zero_point, spec=layer.spec)


def canonical(layer):
    return Canonical(layer.planes, layer.scale, layer.zero_point, layer.bias, layer.spec)


def pair(**options):
    first = make_layer(in_features=70, out_features=96, weight_bits=4, activation_bits=4, **options)
    second = make_layer(in_features=96, out_features=50, weight_bits=3, activation_bits=8, rotation=24, seed=1)
    return first, second


@pytest.mark.parametrize("function", ["none", "gelu_tanh", "silu"])
@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("rows", [1, 7, 300])
def test_one_call_gives_the_bits_of_two(function, dtype, rows):
    layers = pair()
    x = torch.randn(rows, 70, generator=torch.Generator().manual_seed(0)).to(DTYPES[dtype])
    clip = torch.linspace(0.8, 1.0, rows)
    tensors = (LinearTensors(layers[0].bias, clip, clip), LinearTensors(layers[1].bias, None, clip))
    results = {}
    for name in KERNELS:
        weights = tuple(prepacked(layer, name) for layer in layers)
        specs = tuple(layer.spec for layer in layers)
        fused = packed_feed_forward(x, weights=weights, tensors=tensors, specs=specs, function=function, kernel=name)
        hidden = packed_linear(x, weight=weights[0], tensors=tensors[0], spec=specs[0], kernel=name)
        torch_function = {
            "none": lambda h: h,
            "gelu_tanh": lambda h: functional.gelu(h, approximate="tanh"),
            "silu": functional.silu,
        }[function]
        two = packed_linear(torch_function(hidden), weight=weights[1], tensors=tensors[1], spec=specs[1], kernel=name)
        results[name] = fused
        if function == "none" or name == "reference":
            assert torch.equal(fused, two)
        else:
            # A value between that is rounded otherwise can cross a code's border: a step of one 8-bit code in few elements
            assert (fused.double() - two.double()).abs().max() <= 0.02 * two.double().abs().max()
            assert (fused != two).double().mean() < 0.3
    cpu = [results[name] for name in KERNELS if name != "reference"]
    assert all(torch.equal(cpu[0], other) for other in cpu)


def test_the_function_is_that_of_float64():
    # the second layer passes one column on: what comes out is the function, quantized to 8 bits of its own range
    x = torch.linspace(-12, 12, 4001)[:, None]
    first = make_layer(in_features=1, out_features=1, weight_bits=8, activation_bits=8, weight_zero_point="none")
    first.codes.fill_(255)
    first.scale.fill_(1 / 127)
    first.bias.zero_()
    second = make_layer(in_features=1, out_features=1, weight_bits=8, activation_bits=8, weight_zero_point="none")
    second.codes, second.planes = first.codes, (first.codes,)
    second.scale.fill_(1 / 127)
    first.planes = (first.codes,)
    expected = {
        "gelu_tanh": functional.gelu(x.double(), approximate="tanh"),
        "silu": functional.silu(x.double()),
    }
    for name in KERNELS:
        weights = tuple(prepacked(layer, name) for layer in (first, second))
        for function, exact in expected.items():
            y = packed_feed_forward(
                x,
                weights=weights,
                tensors=(LinearTensors(), LinearTensors()),
                specs=(first.spec, second.spec),
                function=function,
                kernel=name,
            )
            # a row of one element is its own range: both quantizers are exact up to roundings of float32
            assert (y.double() - exact).abs().max() < 1e-5


def test_threads_change_nothing():
    layers, x = pair(), make_rows(300, 70, dtype=torch.bfloat16)
    before = torch.get_num_threads()
    for name in KERNELS:
        weights = tuple(prepacked(layer, name) for layer in layers)
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(
                packed_feed_forward(
                    x,
                    weights=weights,
                    tensors=(LinearTensors(), LinearTensors()),
                    specs=tuple(layer.spec for layer in layers),
                    function="gelu_tanh",
                    kernel=name,
                )
            )
        torch.set_num_threads(before)
        assert torch.equal(found[0], found[1])
        assert torch.equal(found[0], found[2])


def test_it_is_an_operator_with_a_known_output():
    layers, name = pair(), KERNELS[0]
    weights = [prepacked(layer, name) for layer in layers]
    specs = [layer.spec.to_string() for layer in layers]
    x = torch.randn(2, 3, 70)
    arguments = (x, *weights, [*LinearTensors(), *LinearTensors()], specs, "silu", name)
    torch.library.opcheck(torch.ops.qvgen.packed_feed_forward.default, arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"function": "relu"}, "function='relu' is unknown; use one of none, gelu_tanh, silu"),
        ({"order": -1}, "the first layer has 50 outputs and the second 70 inputs"),
        ({"bias": torch.zeros(3)}, r"bias is torch.float32 \[3\]; it must be torch.float32 \[50\]"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    layers = pair()[:: change.get("order", 1)]
    with pytest.raises(ValueError, match=message):
        packed_feed_forward(
            torch.randn(2, 70),
            weights=tuple(prepacked(layer, "reference") for layer in layers),
            tensors=(LinearTensors(), LinearTensors(bias=change.get("bias"))),
            specs=tuple(layer.spec for layer in layers),
            function=change.get("function", "none"),
            kernel="reference",
        )


@pytest.mark.parametrize("options", [{}, {"weight_group_size": 8}, {"weight_zero_point": "none"}])
def test_merged_layers_give_the_bits_of_their_parts(options):
    layers = [make_layer(out_features=n, seed=n, rotation=8, **options) for n in (7, 32, 20)]
    merged = merge_linears([canonical(layer) for layer in layers])
    x = make_rows(9, 24, dtype=torch.bfloat16)
    for name in KERNELS:
        weight = get_backend(name).prepack(
            merged.planes, scale=merged.scale, zero_point=merged.zero_point, spec=merged.spec
        )
        y = packed_linear(x, weight=weight, tensors=LinearTensors(merged.bias), spec=merged.spec, kernel=name)
        for part, layer in zip(y.split([7, 32, 20], -1), layers, strict=True):
            assert torch.equal(part, layer(x))


def test_layers_that_differ_are_not_merged():
    with pytest.raises(ValueError, match="differ in more than out_features"):
        merge_linears([canonical(make_layer()), canonical(make_layer(activation_bits=4))])
    with pytest.raises(ValueError, match="branch_rank=2"):
        merge_linears([canonical(make_layer(branch_rank=2))])
    with pytest.raises(ValueError, match="some of the layers have a bias"):
        merge_linears([canonical(make_layer()), canonical(make_layer())._replace(bias=None)])
