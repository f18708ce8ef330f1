"""``method=qdm``: the noise that a prediction implies, and the loss in it, against formulas in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qvgen.data.noise import add_noise
from qvgen.errors import UserError
from qvgen.models.objectives import EpsilonPrediction, FlowMatching, VPrediction
from qvgen.training.loss.prediction_loss import prediction_loss
from tests.runs import train_config

OBJECTIVES = {"flow": FlowMatching(shift=3.0), "v": VPrediction(snr_shift_scale=3.0), "noise": EpsilonPrediction()}


class Family:
    """Calls a model with the noisy samples alone."""

    def __init__(self, objective: object) -> None:
        self.objective = objective

    def predict(self, model: torch.nn.Module, noisy: Tensor, timestep: Tensor, condition: object) -> Tensor:
        del timestep, condition
        return model(noisy)


def draw(objective: object):
    clean = torch.randn(4, 2, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    generators = [torch.Generator().manual_seed(seed) for seed in range(4)]
    return clean, add_noise(clean, [""] * 4, objective=objective, generators=generators)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_perfect_prediction_implies_the_noise_that_was_added(name: str) -> None:
    objective = OBJECTIVES[name]
    _, batch = draw(objective)
    noises = []
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        objective.sample_sigma(generator=generator)
        noises.append(torch.randn(2, 3, 5, 5, generator=generator))
    found = objective.noise(batch.target, noisy=batch.noisy, timestep=batch.timestep)
    torch.testing.assert_close(found, torch.stack(noises), rtol=0, atol=5e-6)  # two float32 products of about 3


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_loss_is_the_distance_of_noises(name: str) -> None:
    """With flow matching errors of velocities count (1 - sigma)^2, with v-prediction abar_t; those of noise 1."""
    objective, method = OBJECTIVES[name], train_config("method=qdm").method
    assert method.needs_teacher
    _, batch = draw(objective)
    student, teacher = torch.nn.Linear(5, 5), torch.nn.Linear(5, 5)
    found = prediction_loss(Family(objective), student, batch, {}, method=method, teacher=teacher)
    with torch.no_grad():
        apart = (student(batch.noisy).double() - teacher(batch.noisy).double()).square().mean((1, 2, 3, 4))
    steps = batch.timestep.double()
    weights = {"flow": (1 - steps / 1000) ** 2, "noise": torch.ones_like(steps)}
    weight = weights[name] if name in weights else objective.alphas_cumprod.double()[steps.long()]
    assert float(found.detach()) == pytest.approx(float((weight * apart).mean()), rel=1e-5)
    found.backward()
    assert student.weight.grad.abs().max() > 0
    assert teacher.weight.grad is None


def test_an_objective_without_a_noise_is_refused_in_one_line() -> None:
    _, batch = draw(OBJECTIVES["flow"])
    method, model = train_config("method=qdm").method, torch.nn.Linear(5, 5)
    with pytest.raises(UserError, match=r"QDM compares noise, and object has no noise\(prediction"):
        prediction_loss(Family(object()), model, batch, {}, method=method, teacher=model)
