"""``method=few_step``: its target against a loop of Euler steps written here, and what training a few-step student draws."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from qvgen.config.leaves import load_leaf
from qvgen.methods.base import OdeWindow
from qvgen.methods.few_step import FewStepDistillation
from qvgen.training.loss.ode_window import window_velocity
from tests.runs import train_config
from tests.training.test_module import make_batch, make_module

FEW_STEP = ("model=tiny_fewstep", "model.num_inference_steps=4")  # tests.runs asks for two steps
NEXT = {1000.0: 0.9, 900.0: 0.75, 750.0: 0.5, 500.0: 0.0}


@pytest.mark.parametrize("sampler", ["null", "lcm"])
def test_the_target_is_the_mean_velocity_of_the_guided_teacher(sampler: str) -> None:
    """Up to the next timestep; to the clean sample where sampling goes there in each step."""
    module = make_module(*FEW_STEP, "method=kd", f"model.sampler={sampler}")
    family, teacher = module.family, load_leaf("model", "tiny").load_teacher()
    draw = module.draw(make_batch(0, 1, 2, 3), step=3)
    encoded = family.encode(draw.captions)
    window = OdeWindow(substeps=3, guidance_scale=2.0)
    found = window_velocity(family, teacher, draw, encoded, encode=family.encode, window=window)
    for index, caption in enumerate(draw.captions):
        start, x = float(draw.timestep[index]) / 1000, draw.noisy[index : index + 1].double()
        end = 0.0 if sampler == "lcm" else NEXT[round(start * 1000, 3)]
        for step in range(3):
            sigma = start + (end - start) * step / 3
            answers = []
            for text in (caption, ""):
                with torch.no_grad():
                    given = (x.float(), torch.tensor([1000 * sigma], dtype=torch.float32), family.encode([text]))
                    answers.append(family.predict(teacher, *given).double())
            velocity = answers[1] + 2 * (answers[0] - answers[1])
            x = x + (end - start) / 3 * velocity
        wanted = (draw.noisy[index].double() - x[0]) / (start - end)
        assert (found[index].double() - wanted).abs().max() < 1e-4  # float32 and the order of a batch's products


def test_training_draws_the_models_timesteps_and_drops_no_caption() -> None:
    config = train_config(*FEW_STEP, "method=kd")
    assert config.model.guidance_distilled
    module = make_module(*FEW_STEP, "method=kd", "method.caption_dropout=1")
    batch = make_batch(0, 1, 2, 3)
    draws = [module.draw(batch, step=step) for step in range(8)]
    assert {float(t) for draw in draws for t in draw.timestep} == set(NEXT)
    assert all(draw.captions == list(batch["caption"]) for draw in draws)
    moved = make_module(*FEW_STEP, "method=kd", "loss.timestep_jitter=3").draw(batch, step=0)
    assert 0 < (moved.timestep - draws[0].timestep).abs().max() <= 3.001
    assert not torch.equal(moved.noisy, draws[0].noisy)


def test_it_trains_a_transformer_towards_its_target() -> None:
    """Without quantization: the loss is mean |v - v*|^2 of the student's prediction, its start the source's weights."""
    config = train_config(*FEW_STEP, "method=few_step")
    method = config.method
    assert isinstance(method, FewStepDistillation)
    assert (method.trains, method.taught_by, method.quantizes) == ("transformer", "tiny", False)
    module = make_module(*FEW_STEP, "method=few_step", "method.substeps=1", "method.guidance_scale=1")
    draw = module.draw(make_batch(0, 1), step=0)
    teacher = module._teacher[0]
    with torch.no_grad():
        encoded = module.encode(draw.captions)
        wanted = (
            module.family.predict(module.student, draw.noisy, draw.timestep, encoded).double()
            - module.family.predict(teacher, draw.noisy, draw.timestep, encoded).double()
        )
        assert abs(float(module.loss(draw)) - float(wanted.square().mean())) < 1e-6
        module.student.load_state_dict(teacher.state_dict())
        # One step of a teacher without guidance is its own prediction.
        assert float(module.loss(replace(draw, target=torch.zeros_like(draw.target)))) < 1e-10
