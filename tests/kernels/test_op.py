"""The registered operator: torch's own opcheck, torch.compile without graph breaks, and refused inputs."""

import pytest
import torch
from torch import nn

from qvgen_kernels import LinearTensors, available_kernels, packed_linear, prepack
from tests.kernels.layer import make_layer, make_rows

OP = torch.ops.qvgen.packed_linear.default


class Block(nn.Module):
    """Two packed layers between ordinary operations, as in a transformer block."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(24)
        self.first = make_layer(out_features=16)
        self.second = make_layer(in_features=16, out_features=24, rotation=16, seed=1)

    def forward(self, x, clip):
        hidden = self.first(self.norm(x), clips=(clip, clip))
        return x + self.second(nn.functional.gelu(hidden), clips=(clip, clip))


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("optional", [True, False])
def test_opcheck(dtype, optional):
    layer = make_layer(weight_zero_point="real")
    x = make_rows(6, 24, dtype=dtype).view(2, 3, 24)
    clip = torch.full((6,), 0.9) if optional else None
    bias = layer.bias if optional else None
    input_scale = torch.linspace(-2, 3, 24) if optional else None
    tensors = [*LinearTensors(bias, clip, clip, input_scale)]
    torch.library.opcheck(OP, (x, layer.weight, tensors, layer.spec.to_string(), "reference"))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_graph_break(backend, dynamic):
    block = Block()
    compiled = torch.compile(block, fullgraph=True, backend=backend, dynamic=dynamic)
    with torch.no_grad():
        for batch in (2, 3):
            x = make_rows(batch * 5, 24).view(batch, 5, 24)
            clip = torch.full((batch * 5,), 0.9)
            assert torch.equal(compiled(x, clip), block(x, clip))


# torch 2.13's inductor itself goes through torch.jit, which it has deprecated
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_compiles_with_inductor():
    # nothing but views around the operator: other work would be compiled by g++, which takes seconds
    layer = make_layer(rotation=8)
    compiled = torch.compile(lambda x: layer(x.transpose(0, 1)).flatten(1), fullgraph=True, backend="inductor")
    x = make_rows(10, 24).view(2, 5, 24)
    assert torch.equal(compiled(x), layer(x.transpose(0, 1)).flatten(1))


def test_shapes_without_data():
    layer = make_layer()
    weight = [tensor.to("meta") for tensor in layer.weight]
    x = torch.empty(2, 3, 24, dtype=torch.bfloat16, device="meta")
    y = packed_linear(
        x, weight=weight, tensors=LinearTensors(bias=layer.bias.to("meta")), spec=layer.spec, kernel="reference"
    )
    assert (y.shape, y.dtype, y.device.type) == ((2, 3, 7), torch.bfloat16, "meta")


def test_backward_says_what_to_do():
    layer = make_layer()
    x = make_rows(2, 24).requires_grad_()
    with pytest.raises(RuntimeError, match="packed_linear has no gradient"):
        layer(x).sum().backward()


def test_runs_in_inference_mode():
    layer, x = make_layer(), make_rows(2, 24)
    with torch.inference_mode():
        y = layer(x)
    assert torch.equal(y, layer(x))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 23)}, r"x has shape \[2, 23\]; .*in_features=24"),
        ({"x": torch.tensor(1.0)}, r"x has shape \[\]"),
        ({"x": torch.zeros(2, 24, dtype=torch.float64)}, r"x is torch\.float64"),
        ({"x": torch.zeros(2, 24, dtype=torch.int32)}, r"x is torch\.int32"),
        ({"bias": torch.zeros(6)}, r"bias is torch\.float32 \[6\]; it must be torch\.float32 \[7\]"),
        ({"bias": torch.zeros(7, dtype=torch.bfloat16)}, r"bias is torch\.bfloat16"),
        ({"clip_low": torch.ones(3)}, r"clip_low is torch\.float32 \[3\]; it must be torch\.float32 \[2\]"),
        ({"clip_high": torch.ones(2, 1)}, r"clip_high is torch\.float32 \[2, 1\]"),
        ({"clip_high": torch.ones(2, device="meta")}, "clip_high is on meta and x on cpu"),
        ({"input_scale": torch.ones(23)}, r"input_scale is torch\.float32 \[23\]; it must be torch\.float32 \[24\]"),
        ({"input_scale": torch.ones(24, dtype=torch.float64)}, r"input_scale is torch\.float64 \[24\]"),
        ({"branch_down": torch.ones(2, 24)}, r"branch_down is torch\.float32 \[2, 24\]; it must be .* \[0, 24\]"),
        ({"gate": torch.ones(3, 7)}, "gate has 3 rows, which do not divide the 2 rows of x; give one row per sample"),
        ({"gate": torch.ones(0, 7)}, "gate has 0 rows"),
        ({"gate": torch.ones(1, 6)}, r"gate is torch\.float32 \[1, 6\]; it must be torch\.float32 \[1, 7\]"),
        ({"gate": torch.ones(7)}, "gate has 7 rows"),
        ({"gate": torch.tensor(1.0)}, r"gate is torch\.float32 \[\]"),
        ({"gate": torch.ones(1, 7, dtype=torch.bfloat16)}, r"gate is torch\.bfloat16 \[1, 7\]"),
        ({"residual": torch.ones(1, 7)}, r"residual is torch\.float32 \[1, 7\]; it must be torch\.float32 \[2, 7\]"),
        ({"residual": torch.ones(2, 7).half()}, r"residual is torch\.float16 \[2, 7\]"),
        ({"residual": torch.ones(2, 7, device="meta")}, "residual is on meta and x on cpu"),
        ({"kernel": "auto"}, "resolved once, before prepacking"),
        ({"kernel": "nope"}, "kernel='nope' is unknown"),
    ],
)
def test_bad_inputs_are_named(change, message):
    layer = make_layer()
    given = {"x": make_rows(2, 24), "bias": layer.bias, "kernel": "reference"} | change
    x, kernel = given.pop("x"), given.pop("kernel")
    with pytest.raises(ValueError, match=message):
        packed_linear(x, weight=layer.weight, tensors=LinearTensors(**given), spec=layer.spec, kernel=kernel)


@pytest.mark.parametrize(
    ("options", "missing"),
    [
        ({"activation_range": "static"}, "row_scale"),
        ({"activation_range": "static", "row_scale": torch.ones(2)}, "row_zero_point"),
        ({"branch_rank": 2}, "branch_down"),
        ({"branch_rank": 2, "branch_down": torch.ones(2, 24)}, "branch_up"),
    ],
)
def test_a_tensor_that_the_spec_needs_is_asked_for(options, missing):
    tensors = {key: value for key, value in options.items() if isinstance(value, torch.Tensor)}
    layer = make_layer(**{key: value for key, value in options.items() if key not in tensors})
    with pytest.raises(ValueError, match=f"{missing} is missing"):
        layer(make_rows(2, 24), **tensors)


def test_opcheck_with_static_ranges_and_a_branch():
    layer = make_layer(activation_range="static", branch_rank=2)
    ones = torch.ones(6)
    tensors = LinearTensors(
        row_scale=ones, row_zero_point=ones, branch_down=torch.ones(2, 24), branch_up=torch.ones(7, 2)
    )
    x = make_rows(6, 24).view(2, 3, 24)
    torch.library.opcheck(OP, (x, layer.weight, [*tensors], layer.spec.to_string(), "reference"))


@pytest.mark.parametrize("gate_dtype", [torch.float32, torch.bfloat16])
def test_opcheck_with_function_gate_and_residual(gate_dtype):
    layer = make_layer(function="silu")
    x = make_rows(6, 24, dtype=torch.bfloat16).view(2, 3, 24)
    tensors = LinearTensors(gate=torch.ones(2, 14, dtype=gate_dtype)[:, ::2], residual=make_rows(7, 6).bfloat16().t())
    torch.library.opcheck(OP, (x, layer.weight, [*tensors], layer.spec.to_string(), "reference"))


@pytest.mark.parametrize("kernel", available_kernels(make_layer().spec))
def test_a_block_with_its_gate_and_residual_compiles(kernel):
    layer = make_layer(out_features=24)
    weight = prepack(layer.planes, scale=layer.scale, zero_point=layer.zero_point, spec=layer.spec, kernel=kernel)

    def block(x, gates):
        tensors = LinearTensors(layer.bias, gate=gates.chunk(2, dim=-1)[1], residual=x.flatten(0, 1))
        rows = torch.nn.functional.silu(x)
        return packed_linear(rows, weight=weight, tensors=tensors, spec=layer.spec, kernel=kernel)

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch.no_grad():
        for batch in (2, 3):
            x, gates = make_rows(batch * 5, 24).view(batch, 5, 24), make_rows(batch, 48)
            assert torch.equal(compiled(x, gates), block(x, gates))
            unfused = x + gates.chunk(2, dim=-1)[1].unsqueeze(1) * layer(torch.nn.functional.silu(x))
            assert torch.equal(block(x, gates), unfused)


def test_a_weight_that_was_cast_or_belongs_elsewhere_is_refused():
    layer = make_layer()
    layer.weight[1] = layer.weight[1].bfloat16()
    with pytest.raises(ValueError, match=r"with torch\.bfloat16 scales"):
        layer(make_rows(2, 24))
    layer.weight = make_layer(out_features=8).weight
    with pytest.raises(ValueError, match=r"torch\.int8 \[8, 24\]"):
        layer(make_rows(2, 24))
