"""``method=kd``: the loss against the teacher's prediction, in float64; nothing is added to a layer."""

from __future__ import annotations

import torch

from qvgen.methods.kd import Distillation
from tests.runs import train_config


def test_it_is_lsq_with_the_teacher_as_the_target() -> None:
    method = train_config("method=kd").method
    assert isinstance(method, Distillation)
    assert method.needs_teacher
    draws = [torch.randn(3, 2, 4, 5, 5, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    prediction, teacher, target = draws
    found = method.loss(prediction, teacher=teacher, target=target, timestep=torch.zeros(3))
    assert abs(float(found) - float((prediction.double() - teacher.double()).square().mean())) < 1e-6


def test_it_has_the_parameters_of_lsq_and_no_helper() -> None:
    config = train_config("method=kd")
    assert config.method.phi_ranks(config.phi) == ()
    assert config.method.schedule(config.phi, num_steps=config.steps) is None
