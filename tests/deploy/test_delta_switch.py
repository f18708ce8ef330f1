"""The activation switch (delta-GBS) against a plain re-telling of its rule, and its way through checkpoints."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from qvgen.deploy.delta_switch import DeltaSwitch, DeltaSwitchConfig, add_switch, find_switch
from qvgen.layers.fake_quant_linear import FakeQuantLinear
from qvgen.layers.noise_band import NoiseBand, watch_timestep
from qvgen.layers.swap import add_switch_widths_, fold, not_sampling
from tests.profiles import COLUMNS, make_profile

STEPS = 12
CONFIG = DeltaSwitchConfig(widths=(4, 8), delta=0.3)


class Model(nn.Module):
    """Gives out prescribed outputs [calls of a step][samples], and notes the widths that its layer runs at."""

    def __init__(self, config: DeltaSwitchConfig = CONFIG) -> None:
        super().__init__()
        band = NoiseBand(4)
        profile = make_profile("paper", weight_bits=4, activation_bits=4)
        self.layer = FakeQuantLinear(nn.Linear(COLUMNS, 2), profile=profile, noise_band=band)
        watch_timestep(self, band)
        self.switch = add_switch(self, config)
        add_switch_widths_(self, config.widths)
        self.widths: list[tuple[int, ...] | None] = []

    def forward(self, output: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        self.widths.append(self.layer.noise_band.policy_bits)
        return output


def make_outputs(samples: int, *, seed: int = 0) -> torch.Tensor:
    """[steps, samples, 3]: walks whose steps are small and large by turns."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.rand(STEPS, samples, 1, generator=generator) * 0.3
    return 1.0 + (torch.randn(STEPS, samples, 3, generator=generator) * size).cumsum(0)


def rule(outputs: torch.Tensor, *, delta: float) -> list[int]:
    """Widths of one sample [steps, 3] as the paper's rule gives them."""
    chosen, total = [], 0.0
    values = outputs.double().numpy()
    for step in range(len(values)):
        if step < 2:
            chosen.append(8)
            continue
        before, last = values[step - 2], values[step - 1]
        total += abs(last - before).sum() / abs(before).sum()
        chosen.append(4 if total < delta else 8)
        total = total if total < delta else 0.0
    return chosen


def sample(model: Model, outputs: torch.Tensor, *, calls: int = 1) -> None:
    """One video: outputs [steps, calls * samples, 3] in so many calls a step."""
    for step, output in enumerate(outputs):
        for part in output.chunk(calls):
            model(part, torch.tensor(900.0 - 50 * step).expand(len(part)))


def test_every_sample_follows_the_rule_by_itself() -> None:
    model, outputs = Model().eval(), make_outputs(3)
    sample(model, outputs)
    wanted = [rule(outputs[:, index], delta=0.3) for index in range(3)]
    assert [list(widths) for widths in zip(*model.widths, strict=True)] == wanted
    assert {4, 8} <= {width for widths in wanted for width in widths}
    assert model.switch.mean_bits() == sum(map(sum, wanted)) / (3 * STEPS)


def test_the_calls_of_guidance_are_watched_apart() -> None:
    model, outputs = Model().eval(), make_outputs(2, seed=1)
    sample(model, outputs, calls=2)
    wanted = [rule(outputs[:, index], delta=0.3) for index in range(2)]
    assert [widths[0] for widths in model.widths[::2]] == wanted[0]
    assert [widths[0] for widths in model.widths[1::2]] == wanted[1]


def test_another_video_begins_anew() -> None:
    model, outputs = Model().eval(), make_outputs(2, seed=2)
    sample(model, outputs)
    sample(model, outputs[:, :1])  # of another number of samples, too
    assert [widths[0] for widths in model.widths[STEPS:]] == [widths[0] for widths in model.widths[:STEPS]]


@pytest.mark.parametrize(("delta", "mean"), [(0.0, 8.0), (1e9, (2 * 8 + (STEPS - 2) * 4) / STEPS)])
def test_extreme_deltas_are_one_width(delta: float, mean: float) -> None:
    model = Model(DeltaSwitchConfig(widths=(4, 8), delta=delta)).eval()
    sample(model, make_outputs(2))
    assert model.switch.mean_bits() == mean


def test_outputs_that_are_zero_or_not_finite_are_careful() -> None:
    model = Model().eval()
    outputs = torch.ones(6, 2, 3)
    outputs[2:4, 0] = 0.0
    outputs[2, 1] = float("nan")
    sample(model, outputs)
    first, second = (list(widths) for widths in zip(*model.widths, strict=True))
    assert first == [8, 8, 4, 8, 8, 8]  # 1 -> 1, 1 -> 0, 0 -> 0, 0 -> 1
    assert second[3:5] == [8, 8]


def test_it_acts_only_where_the_model_samples() -> None:
    model = Model().eval()
    with not_sampling(model):
        sample(model, make_outputs(2))
    model.train()
    sample(model, make_outputs(2))
    assert model.switch.mean_bits() is None
    assert set(model.widths) == {None}


def test_a_copy_has_a_policy_of_its_own() -> None:
    model = Model().eval()
    other = copy.deepcopy(model)
    sample(other, make_outputs(2))
    assert find_switch(other) is not find_switch(model)
    assert find_switch(other).band is other.layer.noise_band
    assert model.switch.mean_bits() is None
    assert isinstance(find_switch(other), DeltaSwitch)
    assert find_switch(nn.Linear(1, 1)) is None


def test_layers_without_the_width_are_refused() -> None:
    model = Model()
    with pytest.raises(ValueError, match=r"activation_switch.widths=\[5, 8\] lack the 4 activation bits of layer"):
        add_switch_widths_(model, (5, 8))
    fold(model)
    assert model.layer.form.width_table.switch == (4, 8)


@pytest.mark.parametrize(
    ("widths", "delta", "message"),
    [
        ((8, 4), 0.1, "two rising widths"),
        ((4, 9), 0.1, "two rising widths"),
        ((4,), 0.1, "two rising widths"),
        ((4, 8), -0.1, "delta=-0.1 must be 0 or more"),
        ((4, 8), float("nan"), "delta=nan must be 0 or more"),
    ],
)
def test_bad_values_are_named(widths: tuple[int, ...], delta: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DeltaSwitchConfig(widths=widths, delta=delta)  # type: ignore[arg-type]
