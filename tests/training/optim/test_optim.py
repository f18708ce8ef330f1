"""Parameter groups, learning rate and moments: checked against the recipe (docs/method.md) and a direct formula."""

from __future__ import annotations

import math
from typing import Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from qvgen.config.defaults import load_section
from qvgen.config.schema.learning_rate_tail import LearningRateTail
from qvgen.errors import UserError
from qvgen.layers.swap import quantized_layers
from qvgen.lowrank.decay import DecaySchedule
from qvgen.methods.parameter_group import parameter_groups
from qvgen.methods.phi_decay import forget_moments_
from qvgen.quant.width_table import WidthTable
from qvgen.training.optim.optimizer import build_optimizer, learning_rate_factor
from qvgen.training.optimizer_module import total_norm
from tests.parts import prepared
from tests.runs import train_config


@pytest.fixture(scope="module")
def student() -> nn.Module:
    config = train_config()
    return prepared(config)[0]


def test_every_trainable_parameter_is_in_one_group(student: nn.Module) -> None:
    groups = parameter_groups(student, train_config().optim)
    listed = [id(parameter) for group in groups for parameter in group["params"]]
    assert len(listed) == len(set(listed))
    assert set(listed) == {id(parameter) for parameter in student.parameters() if parameter.requires_grad}


def test_groups_have_the_rates_and_decays_of_the_recipe(student: nn.Module) -> None:
    optim = train_config("optim.learning_rate=1e-3", "optim.clip_learning_rate=1e-2", "optim.weight_decay=0.5").optim
    found = {group["name"]: (group["lr"], group["weight_decay"]) for group in parameter_groups(student, optim)}
    assert found == {
        "weights": (1e-3, 0.5),
        "phi": (1e-3, 0.5),
        "scales": (1e-3, 0.0),
        "clips": (1e-2, 0.0),
        "biases_and_norms": (1e-3, 0.0),
    }
    names = {id(parameter): name for name, parameter in student.named_parameters()}
    members = {
        group["name"]: [names[id(parameter)] for parameter in group["params"]]
        for group in parameter_groups(student, optim)
    }
    assert all(name.endswith((".left", ".right")) for name in members["phi"])
    assert all(name.endswith((".scale", ".zero_point")) for name in members["scales"])
    assert all(name.endswith((".clip_low", ".clip_high")) for name in members["clips"])
    assert "proj_out.weight" in members["weights"]
    assert "proj_out.bias" in members["biases_and_norms"]
    layers = 36
    inputs = layers - 3 * 3  # in each of 3 blocks q, k and v share one, and k and v of the text
    assert [len(members[name]) for name in ("phi", "scales", "clips")] == [2 * layers, 2 * layers, 2 * inputs]


def test_other_widths_of_a_plan_have_the_rates_of_the_first() -> None:
    """A decayed scale would shrink the grid; clips are logits, whatever their width."""
    config = train_config("bits=w4a4", "activation_switch.widths=[4,8]")
    student, _ = prepared(config)
    for layer in quantized_layers(student).values():
        layer.set_width_table_(WidthTable(bands=((4, 4), (8, 4)) * 25, switch=(4, 8)))
    names = {id(parameter): name for name, parameter in student.named_parameters()}
    groups = {
        group["name"]: [names[id(p)] for p in group["params"]] for group in parameter_groups(student, config.optim)
    }
    scales = ["weight_quantizer.scale", "weight_quantizer.zero_point"]
    scales += ["other_weight_quantizers.8.scale", "other_weight_quantizers.8.zero_point"]
    clips = ["activation_quantizer.clip_low", "activation_quantizer.clip_high"]
    clips += ["other_activation_quantizers.8.clip_low", "other_activation_quantizers.8.clip_high"]
    for group, wanted in (("scales", scales), ("clips", clips)):
        found = [name.removeprefix("proj_out.") for name in groups[group] if name.startswith("proj_out.")]
        assert found == wanted
        assert all(name.endswith(tuple(wanted)) for name in groups[group])


def test_frozen_parameters_and_empty_groups_are_left_out() -> None:
    model = nn.Linear(4, 3, bias=False)
    frozen = nn.Linear(3, 2)
    frozen.requires_grad_(False)
    (group,) = parameter_groups(nn.Sequential(model, frozen), train_config().optim)
    assert group["name"] == "weights"
    assert group["params"] == [model.weight]


@given(st.integers(1, 500), st.floats(0, 1))
def test_the_rate_warms_up_and_falls(num_steps: int, share: float) -> None:
    factors = [learning_rate_factor(step, num_steps=num_steps, warmup_share=share) for step in range(num_steps)]
    warmup = round(share * num_steps)
    assert all(0 < factor <= 1 for factor in factors)  # no step is wasted
    assert factors[:warmup] == [(step + 1) / warmup for step in range(warmup)]
    assert factors[warmup:] == sorted(factors[warmup:], reverse=True)
    if warmup < num_steps:
        assert factors[warmup] == 1.0


@given(
    st.integers(1, 500),
    st.floats(0, 1),
    st.floats(0, 1, exclude_max=True),
    st.floats(0.01, 1),
    st.sampled_from(["constant", "cosine"]),
)
def test_the_tail_begins_when_phi_is_gone(
    num_steps: int, warmup_share: float, share: float, rate: float, kind: Literal["constant", "cosine"]
) -> None:
    tail = LearningRateTail(tail_share=share * (1 - warmup_share), tail_rate=rate, tail=kind)
    factors = [
        learning_rate_factor(step, num_steps=num_steps, warmup_share=warmup_share, tail=tail)
        for step in range(num_steps)
    ]
    plain = [learning_rate_factor(step, num_steps=num_steps, warmup_share=warmup_share) for step in range(num_steps)]
    if not tail.tail_share:
        assert factors == plain
        return
    warmup = round(warmup_share * num_steps)
    begin = max(warmup, DecaySchedule(ranks=(), kept=1, num_steps=num_steps, tail_share=tail.tail_share).decay_steps)
    assert factors[:warmup] == plain[:warmup]
    assert all(0 < factor <= 1 for factor in factors)
    assert factors[warmup:] == sorted(factors[warmup:], reverse=True)
    assert all(factor >= rate for factor in factors[warmup:begin])
    assert factors[begin : begin + 1] == [rate][: num_steps - begin]
    if kind == "constant":
        assert set(factors[begin:]) <= {rate}
    else:
        length = num_steps - begin
        assert factors[begin:] == pytest.approx(
            [rate * (1 + math.cos(math.pi * i / length)) / 2 for i in range(length)]
        )


def test_a_rate_that_falls_in_the_tail_alone_or_never() -> None:
    def factors(**keys: object) -> list[float]:
        optim = load_section("optim", learning_rate=1e-3, warmup_share=0.2, **keys)
        return [learning_rate_factor(step, num_steps=10, warmup_share=0.2, tail=optim) for step in range(10)]

    assert factors(tail_share=0.8, tail_rate=1.0) == [0.5] + [1.0] * 9
    assert factors(tail_share=0.2, tail_rate=1.0, tail="cosine") == pytest.approx([0.5, *[1.0] * 8, 0.5])
    with pytest.raises(
        UserError, match=r"optim.tail_share=0.9 begins before optim.warmup_share=0.2 ends; write .*=0.8"
    ):
        factors(tail_share=0.9)
    with pytest.raises(UserError, match=r"optim.tail_rate=0.0 is outside \(0, 1\]"):
        factors(tail_rate=0.0)


def test_the_rate_is_that_of_the_step() -> None:
    config = train_config("optim.warmup_share=0.25")
    model = nn.Linear(2, 2)
    optimizer, schedule = build_optimizer(parameter_groups(model, config.optim), config.optim, num_steps=8)
    rates = []
    for _ in range(8):
        rates.append(optimizer.param_groups[0]["lr"])
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        schedule.step()
    peak = config.optim.learning_rate
    cosine = [peak * 0.5 * (1 + math.cos(math.pi * step / 6)) for step in range(6)]
    assert rates == pytest.approx([peak / 2, peak, *cosine], rel=1e-12)


def test_forgotten_moments_start_like_new_ones() -> None:
    def step(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> torch.Tensor:
        parameter.grad = torch.tensor([0.3, -2.0])
        optimizer.step()
        return parameter.detach().clone()

    optim = train_config().optim
    old, other, new = (nn.Parameter(torch.ones(2)) for _ in range(3))
    optimizer, _ = build_optimizer(parameter_groups(nn.ParameterList([old, other]), optim), optim, num_steps=1000)
    step(optimizer, old)
    step(optimizer, other)
    kept = {name: value.clone() for name, value in optimizer.state[other].items()}
    forget_moments_(optimizer, old)
    assert all(not value.any() for value in optimizer.state[old].values())
    for name, value in optimizer.state[other].items():
        assert torch.equal(value, kept[name])
    with torch.no_grad():
        old.fill_(1.0)
    other.grad = None
    fresh, _ = build_optimizer(parameter_groups(nn.ParameterList([new]), optim), optim, num_steps=1000)
    assert torch.equal(step(optimizer, old), step(fresh, new))
    forget_moments_(fresh, other)  # not known to it: nothing to forget


def test_the_norm_is_the_same_bits_however_gradients_are_cut() -> None:
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(size, generator=generator) for size in (1, 50, 4097)]
    norm = total_norm(gradients)
    assert norm.dtype == torch.float32
    assert float(norm) == float(torch.cat(gradients).double().square().sum().sqrt().float())
    for rows in (1, 3, 25, 1000):
        assert torch.equal(total_norm([piece for gradient in gradients for piece in gradient.split(rows)]), norm)


def test_adamw_trains_the_same_bits_however_parameters_are_cut() -> None:
    """Pieces that fill no vector of a CPU: what is left over may not be rounded in another way."""
    generator = torch.Generator().manual_seed(0)
    start, gradients = torch.randn(10_000, generator=generator), torch.randn(8, 10_000, generator=generator)
    found = []
    for size in (50, 25, 7):
        pieces = nn.ParameterList(nn.Parameter(piece.clone()) for piece in start.split(size))
        optimizer, schedule = build_optimizer(
            parameter_groups(pieces, train_config().optim), train_config().optim, num_steps=8
        )
        for gradient in gradients:
            for piece, part in zip(pieces, gradient.split(size), strict=True):
                piece.grad = part.clone()
            optimizer.step()
            schedule.step()
        moments = [torch.cat([optimizer.state[p][name] for p in pieces]) for name in ("exp_avg", "exp_avg_sq")]
        found.append([torch.cat(list(pieces)).detach(), *moments])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
