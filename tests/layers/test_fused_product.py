"""The fused product of a fake-quantized layer against the same layer computed by torch alone: the same bits, everywhere.

Every random case is a layer with its own grids, Phi, rotation, smoothing, branch, static or dynamic ranges, and an input with
rows of all kinds; outputs and all gradients are compared. The definition itself is held to float64 in test_layer_oracle.py.
"""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from qvgen.layers import fake_quant_product
from qvgen.layers.fake_quant_linear import FakeQuantLinear
from qvgen.layers.fused_product import is_fused, unfused
from qvgen.layers.noise_band import NoiseBand
from qvgen.quant.grid import Grid, Profile
from qvgen.training.planning.live_bytes import LiveBytes
from qvgen_kernels import fake_quantize_cpu
from qvgen_kernels.cpu_library import BACKENDS, missing_reason, supported
from tests.layers.model import make_layer, make_rows

pytestmark = pytest.mark.skipif(missing_reason() is not None, reason="no C++ compiler")
TIMESTEPS = [100.0, 600.0]
WIDTHS = (8, 16, 24, 40, 64, 72, 128, 264, 1000, 1920)


@pytest.fixture
def fused_calls(monkeypatch):
    """Each pass's answer to whether it is fused."""
    answers = []

    def asked(*arguments):
        answers.append(is_fused(*arguments))
        return answers[-1]

    monkeypatch.setattr(fake_quant_product, "is_fused", asked)
    return answers


def draw_grid(draw, *, group, is_weight, is_static=False):
    zero_point = draw.choice(["integer", "real", "none"] if is_weight else ["integer", "none"])
    per_row = "per_channel" if is_weight else "per_token"
    free = zero_point == "none" and not is_weight and not is_static
    return Grid(
        bits=draw.choice([2, 3, 4, 6, 8]),
        granularity="per_group" if group else per_row,
        group_size=group,
        zero_point=zero_point,
        scale_dtype="float32" if is_static else draw.choice(["float32", "bfloat16", "float16"]),
        arithmetic=draw.choice(["reciprocal", "division", "unrounded"]) if free else "reciprocal",
        clip=is_weight or draw.random() < 0.8,
    )


def draw_layer(draw):
    """A layer of random kind, with clipped weights, and a scale and zero points that the grid does not have."""
    columns, is_static = draw.choice(WIDTHS), draw.random() < 0.2
    group = draw.choice([size for size in (8, 16, 24, 32, 64, columns) if columns % size == 0])
    groups = [group if draw.random() < 0.3 else None for _ in range(2)]
    profile = Profile(
        name="drawn",
        weight=draw_grid(draw, group=groups[0], is_weight=True),
        activation=draw_grid(draw, group=None if is_static else groups[1], is_weight=False, is_static=is_static),
        rotation=draw.choice([0, 0, 8]),
    )
    linear = nn.Linear(columns, draw.choice([8, 9, 33, 64]), bias=draw.random() < 0.8)
    layer = FakeQuantLinear(linear, profile=profile, noise_band=NoiseBand(4), phi_rank=draw.choice([0, 4]))
    rows = layer.weight.detach().unflatten(-1, (layer.weight_quantizer.scale.shape[1], -1))
    scale = (rows.amax(-1) - rows.amin(-1)) / profile.weight.qmax * 0.8 + 1e-4
    scale[0] = -1e-9
    zero = torch.rand_like(scale) * profile.weight.qmax * 1.1 - 0.2
    zero[1], zero[2] = -7.3, -60000.4  # as real zero points of rows that do not contain 0
    layer.weight_quantizer.start_from_(scale, zero)
    if layer.phi is not None:
        layer.start_phi_(generator=torch.Generator().manual_seed(0))
        layer.phi.rank_gate.mul_(0.7)
    if draw.random() < 0.3:
        layer.move_(profile=profile, input_scale=torch.rand(columns) + 0.5)
    if is_static:
        layer.set_static_(timesteps=TIMESTEPS, scale=torch.tensor([0.1, 0.2]), zero_point=torch.tensor([3.2, 1.7]))
    if draw.random() < 0.3:
        layer.set_branch_(torch.randn(4, columns), torch.randn(linear.out_features, 4))
    layer.through_zero_point = draw.random() < 0.6
    layer.noise_band.set_timestep(torch.tensor(TIMESTEPS))
    return layer


def draw_input(draw, columns):
    x = torch.randn(2, draw.choice([1, 2, 3, 17, 50]), columns) * 10 ** draw.uniform(-2, 2)
    if x.shape[1] > 2:
        x[0, 0] = 0
        x[0, 1], x[1, 0] = x[0, 1].abs(), -x[1, 0].abs()
        x[1, 1, :3], x[1, 1, 4:7] = x[1, 1].max(), x[1, 1].min()
        x[1, 2] *= 1e-20
        x[0, 2, :8] = x[0, 2].abs().max() * torch.tensor([1.0, -1.0] * 4)
    if x.shape[1] > 10:
        x[0, 3, 1], x[0, 4, 2], x[0, 5, 2] = float("nan"), float("inf"), -float("inf")
        x[0, 6] *= 1e35
        x[0, 7], x[0, 9] = x[0, 7].round(), 3
        x[0, 8, ::2] = -0.0
    x = x.to(draw.choice([torch.float32] * 4 + [torch.bfloat16, torch.float16]))
    return torch.cat([x, x], -1)[..., :columns] if draw.random() < 0.15 else x


def draw_gradient(draw, shape):
    kind = draw.random()
    if kind < 0.1:
        return torch.ones(()).expand(shape)
    gradient = torch.randn(shape)
    return gradient.transpose(0, 1).contiguous().transpose(0, 1) if kind < 0.25 else gradient


def passes(layer, x, gradient, *, autocast=False, call=None):
    """y, and the gradients of x and of all parameters."""
    x = x.detach().requires_grad_()
    layer.zero_grad(set_to_none=True)
    x.grad = None
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        y = (call or layer)(x)
    y.backward(gradient.to(y.dtype))
    return {"y": y.detach(), "x": x.grad, **{name: p.grad for name, p in layer.named_parameters()}}


def assert_same(found, expected):
    for name, value in expected.items():
        if value is None:
            assert found[name] is None, name
            continue
        assert found[name].dtype == value.dtype, name
        torch.testing.assert_close(
            found[name], value, rtol=0, atol=0, equal_nan=True, msg=lambda text, n=name: f"{n}: {text}"
        )


@pytest.mark.parametrize("variant", fake_quantize_cpu.VARIANTS)
def test_random_layers_have_torchs_bits(variant, monkeypatch, fused_calls):
    if supported(variant) is not None:
        pytest.skip(supported(variant))
    monkeypatch.setattr(fake_quantize_cpu, "_backend", lambda: BACKENDS[variant])
    for seed in range(60):
        draw = random.Random(f"{seed} {variant}")
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            layer = draw_layer(draw)
            x = draw_input(draw, layer.in_features)
            gradient = draw_gradient(draw, (*x.shape[:-1], layer.out_features))
        autocast = draw.random() < 0.25
        with unfused():
            expected = passes(layer, x, gradient, autocast=autocast)
        fused_calls.clear()
        assert_same(passes(layer, x, gradient, autocast=autocast), expected)
        assert fused_calls == [True, True], f"seed {seed}"


@pytest.mark.parametrize("name", ["paper", "paper_real", "svdq_g64", "int8", "convrot"])
def test_profiles_have_torchs_bits_on_any_number_of_threads(name, fused_calls):
    """With two threads each takes some rows, and BLAS has other bits than with one."""
    layer, x = make_layer(name, seed=3, phi_rank=2), make_rows()
    layer.noise_band.set_timestep(torch.tensor(10.0))
    x = x.repeat(30, 16, 1) * torch.linspace(0.5, 2, x.shape[-1])
    gradient = torch.randn(*x.shape[:-1], layer.out_features, generator=torch.Generator().manual_seed(1))
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            with unfused():
                expected = passes(layer, x, gradient)
            assert_same(passes(layer, x, gradient), expected)
    finally:
        torch.set_num_threads(before)
    assert fused_calls == [False, False, True, True] * 2


def test_checkpointing_recomputes_the_same_bits(fused_calls):
    layer, x = make_layer("paper", seed=2, phi_rank=2), make_rows()
    layer.noise_band.set_timestep(torch.tensor(10.0))
    gradient = torch.ones(*x.shape[:-1], layer.out_features)
    with unfused():
        expected = passes(layer, x, gradient)
    found = passes(layer, x, gradient, call=lambda rows: checkpoint(layer, rows, use_reentrant=False))
    assert_same(found, expected)
    assert fused_calls == [False, False, True, True, True]  # forward, again, backward


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own, of all functions
def test_each_reason_leaves_the_product_to_torch(fused_calls, monkeypatch):
    layer, x = make_layer("paper", seed=2), make_rows()
    layer.noise_band.set_timestep(torch.tensor(10.0))
    with torch.no_grad():
        y = layer(x)
        assert layer(x[:0]).shape == (0, *y.shape[1:])
        crosswise = x.reshape(-1, x.shape[-1]).t().contiguous().t()
        assert torch.equal(layer(crosswise), y.reshape(-1, y.shape[-1]))
        assert layer(x.double()).dtype == torch.float64
        with LiveBytes():  # a plan of memory
            assert torch.equal(layer(x), y)
        assert fused_calls == [True, False, False, False, False]
        monkeypatch.undo()  # a list of answers is nothing that a compiler can follow
        assert torch.equal(torch.compile(layer, backend="eager", fullgraph=True)(x), y)


def test_second_derivatives_are_refused_by_torchs_own_passes(fused_calls):
    """Fused operators would give zeros without a word."""
    layer, x = make_layer("paper", seed=2), make_rows().requires_grad_()
    layer.noise_band.set_timestep(torch.tensor(10.0))
    y = layer(x).square().sum()
    with pytest.raises(RuntimeError, match="don't support automatic differentiation"):
        torch.autograd.grad(y, x, create_graph=True)
    assert fused_calls == [True, False]


def test_extremes_of_either_path_serve_the_other(monkeypatch):
    """A forward pass by torch and a backward pass by fused operators, and the other way round."""
    for name in ("paper", "svdq_g64"):
        monkeypatch.undo()
        layer, x = make_layer(name, seed=2), make_rows()
        layer.noise_band.set_timestep(torch.tensor(10.0))
        gradient = torch.ones(*x.shape[:-1], layer.out_features)
        with unfused():
            expected = passes(layer, x, gradient)
        for order in ([True, False], [False, True]):
            answers = iter(order)
            monkeypatch.setattr(fake_quant_product, "is_fused", lambda *_, answers=answers: next(answers))
            assert_same(passes(layer, x, gradient), expected)


def test_grids_differ_in_what_is_asked_of_the_operators():
    """The cache of specs keeps grids apart that differ in one field."""
    layer, x = make_layer("paper", seed=2), make_rows()
    layer.noise_band.set_timestep(torch.tensor(10.0))
    outputs = []
    for bits in (2, 3, 4):
        layer.declare_(
            profile=replace(layer.profile, activation=replace(layer.profile.activation, bits=bits)), input_scale=None
        )
        with torch.no_grad():
            outputs.append(layer(x))
            with unfused():
                assert torch.equal(outputs[-1], layer(x))
    assert not torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[1], outputs[2])
