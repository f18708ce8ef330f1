"""Min-SNR weights: each kind of prediction against the error of the clean sample that it implies, in float64."""

from __future__ import annotations

import pytest
import torch

from qvgen.config.defaults import load_section
from qvgen.data.noise import NoisyBatch
from qvgen.errors import UserError
from qvgen.models.objectives import FlowMatching, VPrediction
from qvgen.training.loss.min_snr import min_snr_weights
from qvgen.training.loss.prediction_loss import prediction_loss
from tests.methods.test_qdm import OBJECTIVES, Family, draw
from tests.runs import train_config

LIMIT = 2.0


def signal_and_noise(name: str, timestep: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Float64 [B, 1, 1, 1, 1], from the formulas."""
    steps = timestep.double().view(-1, 1, 1, 1, 1)
    if name == "flow":
        return 1 - steps / 1000, steps / 1000
    alphas = OBJECTIVES[name].alphas_cumprod.double()[steps.long()]
    return alphas.sqrt(), (1 - alphas).sqrt()


def implied(name: str, compares: str, output: torch.Tensor, batch: NoisyBatch) -> torch.Tensor:
    """The clean sample that a model's output, a velocity, implies, float64; for noise by way of the noise."""
    a, b = signal_and_noise(name, batch.timestep)
    output, x = output.double(), batch.noisy.double()
    if name == "noise":
        return (x - b * output) / a
    if compares == "prediction":
        return x - b * output if name == "flow" else a * x - b * output
    noise = x + a * output if name == "flow" else a * output + b * x
    return (x - b * noise) / a


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("method", ["kd", "qdm"])
def test_the_loss_is_the_error_of_the_clean_sample_times_the_limited_ratio(name: str, method: str) -> None:
    objective, used = OBJECTIVES[name], train_config(f"method={method}").method
    _, batch = draw(objective)
    student, teacher = torch.nn.Linear(5, 5), torch.nn.Linear(5, 5)
    options = load_section("loss", weighting="min_snr", snr_limit=LIMIT)
    found = prediction_loss(Family(objective), student, batch, {}, method=used, teacher=teacher, options=options)
    a, b = signal_and_noise(name, batch.timestep)
    with torch.no_grad():
        apart = implied(name, used.compares, student(batch.noisy), batch)
        apart = apart - implied(name, used.compares, teacher(batch.noisy), batch)
    ratio = (a / b) ** 2
    assert ratio.min() < LIMIT < ratio.max()
    wanted = (ratio.clamp(max=LIMIT) * apart.square()).mean()
    assert float(found.detach()) == pytest.approx(float(wanted), rel=1e-5)
    found.backward()
    assert student.weight.grad.abs().max() > 0


def test_no_weighting_is_the_loss_as_it_was_to_the_bit() -> None:
    _, batch = draw(OBJECTIVES["flow"])
    student, teacher = torch.nn.Linear(5, 5), torch.nn.Linear(5, 5)
    arguments = (Family(OBJECTIVES["flow"]), student, batch, {})
    for name in ("kd", "qdm", "lsq"):
        given = {"method": train_config(f"method={name}").method, "teacher": None if name == "lsq" else teacher}
        assert torch.equal(
            prediction_loss(*arguments, **given), prediction_loss(*arguments, **given, options=load_section("loss"))
        )


def test_weights_are_the_papers_at_both_ends_of_the_schedule() -> None:
    """min(SNR, gamma) / (SNR + 1) for v and min(SNR, gamma) / SNR for noise, gamma = 5; 0 and 1 at pure noise."""
    objective = VPrediction(snr_shift_scale=1.0)
    a, b = objective.signal_and_noise(torch.arange(1000.0))
    ratio = (a.double() / b.double()) ** 2
    of_v = min_snr_weights(a, b, compares="prediction", limit=5.0)
    of_noise = min_snr_weights(a, b, compares="noise", limit=5.0)
    torch.testing.assert_close(of_v.double(), ratio.clamp(max=5) / (ratio + 1), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(of_noise[:-1].double(), (ratio.clamp(max=5) / ratio)[:-1], rtol=1e-4, atol=1e-6)
    assert (float(of_v[-1]), float(of_noise[-1])) == (0.0, 1.0)
    signal, noise = FlowMatching().signal_and_noise(torch.tensor([0.0, 1000.0]))
    assert min_snr_weights(signal, noise, compares="prediction", limit=5.0).tolist() == [0.0, 0.0]
    assert min_snr_weights(signal, noise, compares="noise", limit=5.0).tolist() == [0.0, 1.0]


def test_an_objective_that_does_not_know_its_signal_is_refused_in_one_line() -> None:
    _, batch = draw(OBJECTIVES["flow"])
    method, model = train_config("method=kd").method, torch.nn.Linear(5, 5)
    options = load_section("loss", weighting="min_snr")
    with pytest.raises(
        UserError, match=r"loss.weighting=min_snr: object has no signal_and_noise\(timestep\); write it"
    ):
        prediction_loss(Family(object()), model, batch, {}, method=method, teacher=model, options=options)
    with pytest.raises(UserError, match="loss.snr_limit=0.0 must be greater than 0"):
        load_section("loss", snr_limit=0)
