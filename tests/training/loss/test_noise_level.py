"""Draws of noise levels against their formulas in float64 (the normal quantile of the standard library, diffusers' table)."""

from __future__ import annotations

import math
from statistics import NormalDist, fmean

import numpy as np
import pytest
import torch
from diffusers import CogVideoXDDIMScheduler

from qvgen.config.defaults import load_section
from qvgen.data.noise import Objective, add_noise
from qvgen.errors import UserError
from qvgen.models.objectives import FlowMatching, VPrediction
from qvgen.training.loss.noise_level import training_objective

FLOW, EXPERT, V = FlowMatching(shift=3.0), FlowMatching(shift=5.0, lowest=0.875), VPrediction(snr_shift_scale=3.0)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def drawn(objective: Objective, count: int) -> list[float]:
    return [float(objective.sample_sigma(generator=generator(seed))) for seed in range(count)]


def log_ratios() -> np.ndarray:
    """log(b_t / a_t) of diffusers' own schedule, whose last entry has no signal."""
    scheduler = CogVideoXDDIMScheduler(snr_shift_scale=3.0, rescale_betas_zero_snr=True)
    alphas = scheduler.alphas_cumprod.double().numpy()
    with np.errstate(divide="ignore"):
        return np.log((1 - alphas) / alphas) / 2


def normal(seed: int, *, mean: float, std: float, low: float = -math.inf, high: float = math.inf) -> float:
    """The quantile, of a normal distribution cut to low..high, of the number that the model's own draw would take."""
    share = float(torch.rand((), generator=generator(seed)).double()) + 2.0**-25
    of = NormalDist(mean, std)
    below, above = (0.0 if end == -math.inf else 1.0 if end == math.inf else of.cdf(end) for end in (low, high))
    return of.inv_cdf(below + (above - below) * share)


@pytest.mark.parametrize(("shift", "wanted"), [(None, 3.0), (1.0, 1.0), (7.0, 7.0)])
def test_flow_levels_are_the_shifted_sigmoid_of_a_normal_number(shift: float | None, wanted: float) -> None:
    options = load_section("loss", levels="logit_normal", level_mean=0.5, level_std=1.5, level_shift=shift)
    for seed, level in enumerate(drawn(training_objective(FLOW, options), 200)):
        u = 1 / (1 + math.exp(-normal(seed, mean=0.5, std=1.5)))
        assert level == pytest.approx(wanted * u / (1 + (wanted - 1) * u), abs=1e-6)


def test_levels_of_a_part_are_the_same_density_cut() -> None:
    """The expert for high noise of Wan2.2-A14B: draws that a whole model would have below its border come above it."""
    levels = drawn(training_objective(EXPERT, load_section("loss", levels="logit_normal")), 200)
    border = math.log(0.875 / 0.125)
    for seed, level in enumerate(levels):
        x = normal(seed, mean=math.log(5), std=1.0, low=border)
        assert level == pytest.approx(1 / (1 + math.exp(-x)), abs=1e-6)
    assert min(levels) >= 0.875


@pytest.mark.parametrize("shift", [None, 1.0])
def test_v_prediction_draws_the_step_of_the_same_noise_over_signal(shift: float | None) -> None:
    """The root of snr_shift_scale is the model's own shift."""
    options = load_section("loss", levels="logit_normal", level_mean=-0.5, level_std=2.0, level_shift=shift)
    table = log_ratios()
    mean = -0.5 + (math.log(3) / 2 if shift is None else 0.0)
    for seed, level in enumerate(drawn(training_objective(V, options), 200)):
        x = normal(seed, mean=mean, std=2.0, low=table[0], high=table[998])
        step = level * 1000
        assert step == pytest.approx(round(step), abs=1e-3)
        assert abs(table[round(step)] - x) <= np.abs(table - x).min() + 1e-4  # float32 tables: one of two at a border
        assert float(V.timestep(torch.tensor(level))) == round(step) < 999


def test_middle_levels_come_more_often_than_with_uniform_draws() -> None:
    options = load_section("loss", levels="logit_normal", level_shift=1.0)
    levels = drawn(training_objective(FlowMatching(), options), 2000)
    inside = fmean(0.25 < level < 0.75 for level in levels)
    assert inside == pytest.approx(2 * NormalDist().cdf(math.log(3)) - 1, abs=0.05)  # 0.73; 5 standard deviations


def test_uniform_levels_take_another_shift_in_training_alone() -> None:
    options = load_section("loss", level_shift=1.0)
    found = training_objective(EXPERT, options)
    assert drawn(found, 20) == drawn(FlowMatching(shift=1.0, lowest=0.875), 20)
    assert EXPERT.shift == 5.0
    assert training_objective(EXPERT, load_section("loss")) is EXPERT
    assert training_objective(V, load_section("loss")) is V


@pytest.mark.parametrize("objective", [FLOW, V], ids=["flow", "v"])
def test_noise_and_captions_of_a_sample_are_the_same_whatever_its_level(objective: Objective) -> None:
    """So that runs with different levels are compared in pairs; and the noised sample is the objective's at its level."""
    clean = torch.randn(8, 2, 3, 4, 4, generator=generator(0))
    found = []
    for levels in ("uniform", "logit_normal"):
        used = training_objective(objective, load_section("loss", levels=levels))
        batch = add_noise(
            clean, list("abcdefgh"), objective=used, generators=[generator(seed) for seed in range(8)],
            caption_dropout=0.5,
        )  # fmt: skip
        found.append((batch, objective.noise(batch.target, noisy=batch.noisy, timestep=batch.timestep)))
    (one, noise), (other, other_noise) = found
    assert not torch.equal(one.timestep, other.timestep)
    torch.testing.assert_close(noise, other_noise, rtol=0, atol=5e-6)  # of two float32 products of about 3
    assert one.captions == other.captions
    assert len(set(one.captions)) > 2
    again = objective.add_noise(clean, noise, sigma=other.timestep / 1000)
    torch.testing.assert_close(other.noisy, again, rtol=0, atol=1e-5)


def test_what_an_objective_can_not_have_is_refused_in_one_line() -> None:
    with pytest.raises(UserError, match=r"loss.level_shift=3.0: the uniform noise levels of VPrediction have no shift"):
        training_objective(V, load_section("loss", level_shift=3.0))
    with pytest.raises(UserError, match=r"loss.levels=logit_normal: object has no shift; write it"):
        training_objective(object(), load_section("loss", levels="logit_normal"))
    with pytest.raises(UserError, match=r"at -7.39 \(log of noise over signal\), far from the 0.875 to 1.0 that"):
        training_objective(EXPERT, load_section("loss", levels="logit_normal", level_mean=-9.0))
    for key, value, message in (
        ("level_std", 0, "loss.level_std=0.0 must be greater than 0"), ("level_shift", 0.5, "loss.level_shift=0.5"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            load_section("loss", **{key: value})
