"""Few-step sampling of every family that lays out its steps in a way of its own, and of those that predict noise or v.

Against steps in float64 over what the transformer answered; ``sampler=lcm`` of noise and v to diffusers' LCMScheduler too.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import LCMScheduler
from torch import nn

from qvgen.models.base import example_condition
from qvgen.models.few_step import own_timesteps
from qvgen.training.loss.noise_level import training_objective
from tests.models.any_folders import make_any_folder
from tests.models.family_checks import tiny_family
from tests.models.further_folders import make_hunyuan15_folder, make_hunyuan_folder, make_mochi_folder
from tests.models.hub_folders import CAPTIONS, make_cogvideox_folder
from tests.models.ltx_folders import make_latte_folder, make_ltx_folder
from tests.models.opensora_folders import WINDOW, make_opensora_folder
from tests.models.test_few_step import drawn, load_section

STEPS = (1000.0, 757.5, 522.0)
WHOLE = (999.0, 758.0, 259.0)
FEW = {"num_inference_steps": 3, "guidance_scale": 1.0, "guidance_distilled": True}
SMALL = {"num_frames": 1, "sampling_frames": 1}
pytestmark = [
    pytest.mark.filterwarnings("ignore:In CPU autocast"),  # Mochi's transformer turns it off, in its own way
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"),
]


@dataclass(frozen=True)
class Case:
    """One family: its folder, its clips, and what its transformer answers in the terms of a flow from clean to noise."""

    name: str
    make: Callable[[Path], Path]
    sizes: dict[str, Any] = field(default_factory=dict)
    sign: float = 1.0
    told: Callable[[float], float] = float


FLOWS = [
    Case("hunyuanvideo", make_hunyuan_folder),
    Case("hunyuanvideo1.5", make_hunyuan15_folder),
    Case("ltx", lambda path: make_ltx_folder(path, "0.9.1"), {"height": 64, "width": 96}),
    Case("ltx-13b", lambda path: make_ltx_folder(path, "13b"), {"height": 64, "width": 96}),
    Case("mochi", make_mochi_folder, {"num_frames": 7, "sampling_frames": 7}, -1.0, lambda t: 1000 - t),
    Case("opensora", make_opensora_folder, {"num_frames": WINDOW, "sampling_frames": WINDOW}, -1.0),
    Case("diffusers", make_any_folder),
]
DISCRETE = [
    Case("cogvideox", make_cogvideox_folder),
    Case("cogvideox-5b", lambda path: make_cogvideox_folder(path, "5b")),
    Case("latte", make_latte_folder),
    Case("diffusers", lambda path: make_any_folder(path, "pixart_alpha"), SMALL),
]


class _SampledError(Exception):
    pass


def encoded(family: Any, count: int) -> dict[str, torch.Tensor]:
    """Conditions of as many captions, without text encoders."""
    made = example_condition(family, count=count, make=torch.rand)
    return {name: torch.ones_like(value) if "mask" in name else value for name, value in made.items()}


def sampled(family: Any, transformer: nn.Module) -> tuple[list[float], list[np.ndarray], list[np.ndarray]]:
    """Sample one video with seed 7: the timesteps, noisy latents and answers of its calls, of the latents' channels alone."""
    timesteps: list[float] = []
    inputs: list[np.ndarray] = []
    answers: list[np.ndarray] = []

    def look(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        hidden = kwargs.get("hidden_states", args[0] if args else None)
        count = None if hidden.ndim == 3 or hidden.shape == output[0].shape else family.sample_shape[0]
        timesteps.append(float(kwargs["timestep"].reshape(-1)[0]))
        inputs.append(hidden[:, :count].double().numpy())
        answers.append(output[0][:, :count].double().numpy())

    handle = transformer.register_forward_hook(look, with_kwargs=True)

    def done(*_: Any, **__: Any) -> None:
        raise _SampledError

    family._decode_sampled = done  # what follows on the last step is not looked at
    options = {"num_steps": 3, "guidance_scale": 1.0, "encode": lambda texts: encoded(family, len(texts))}
    with suppress(_SampledError):
        family.generate(transformer, CAPTIONS[:1], [7], **options)
    handle.remove()
    return timesteps, inputs, answers


def noises(like: np.ndarray) -> list[np.ndarray]:
    """The noise of a video of seed 7: its first one, then that of each step."""
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(like.shape, generator=generator).double().numpy() for _ in range(3)]


def close(found: np.ndarray, wanted: np.ndarray) -> bool:
    return bool(np.abs(found - wanted).max() < 2e-6 * max(1.0, np.abs(wanted).max()))


@pytest.mark.parametrize("case", FLOWS, ids=lambda case: case.name)
def test_a_flow_is_sampled_trained_and_told_at_its_own_timesteps(case: Case, tmp_path: Path) -> None:
    """The list moves by no shift and no layout of the pipeline's; with lcm it draws new noise from the video's generator."""
    folder = case.make(tmp_path / "hub")
    for sampler in (None, "lcm"):
        family = tiny_family(case.name, folder, timesteps=list(STEPS), sampler=sampler, **FEW, **case.sizes)
        told = [case.told(t) for t in STEPS]
        assert list(own_timesteps(family) or ()) == told
        timesteps, inputs, answers = sampled(family, family.load_teacher(dtype=torch.float32))
        assert timesteps == told
        fresh = noises(answers[0])
        for step, (high, low) in enumerate(pairwise(STEPS)):
            velocity = case.sign * answers[step]
            wanted = inputs[step] + (low - high) / 1000 * velocity
            if sampler == "lcm":
                clean = inputs[step] - high / 1000 * velocity
                wanted = (1 - low / 1000) * clean + low / 1000 * fresh[step + 1]
            if sampler == "lcm" or step == 0 or case.name != "diffusers":  # UniPC looks back from its second step on
                assert close(inputs[step + 1], wanted), (sampler, step)
    assert set(drawn(family.objective, 60).tolist()) == set(told)
    jittered = drawn(training_objective(family.objective, load_section("loss", timestep_jitter=5.0)), 60)
    distance = (jittered[:, None] - torch.tensor(told)).abs().amin(1)
    assert 0 < distance.max() <= 5.001
    visiting = tiny_family(case.name, folder, timesteps="scheduler", **FEW, **case.sizes)
    timesteps, *_ = sampled(visiting, visiting.load_teacher(dtype=torch.float32))
    assert timesteps == list(own_timesteps(visiting) or ())
    assert set(drawn(visiting.objective, 60).tolist()) == set(timesteps)


@pytest.mark.parametrize("case", DISCRETE, ids=lambda case: case.name)
def test_noise_and_v_are_sampled_as_diffusers_lcm_scheduler_does(case: Case, tmp_path: Path) -> None:
    """Its own schedule for the betas, to 1e-6, and the formula of the paper in float64 from the family's table."""
    folder = case.make(tmp_path / "hub")
    family = tiny_family(case.name, folder, timesteps=list(WHOLE), sampler="lcm", **FEW, **case.sizes)
    timesteps, inputs, answers = sampled(family, family.load_teacher(dtype=torch.float32))
    assert timesteps == list(WHOLE) == list(own_timesteps(family) or ())
    formula, config = family.objective.objective, family.scheduler().config
    table = formula.alphas_cumprod.double().numpy()
    theirs = LCMScheduler(
        beta_start=config["beta_start"], beta_end=config["beta_end"], beta_schedule=config["beta_schedule"],
        prediction_type=config["prediction_type"], rescale_betas_zero_snr=bool(config.get("rescale_betas_zero_snr")),
        clip_sample=bool(config.get("clip_sample")),
    )  # fmt: skip
    theirs.set_timesteps(timesteps=[999, 759, 259])
    theirs.timesteps = torch.tensor([999, 758, 259])
    generator = torch.Generator().manual_seed(7)
    torch.randn(answers[0].shape, generator=generator)
    fresh = noises(answers[0])
    for step, (t, following) in enumerate(zip((999, 758), (758, 259), strict=True)):
        x, answer = inputs[step], answers[step]
        a, b = np.sqrt(table[t]), np.sqrt(1 - table[t])
        clean = (x - b * answer) / a if hasattr(formula, "predicts_noise") else a * x - b * answer
        skip, out = 0.25 / (100.0 * t * t + 0.25), 10.0 * t / np.sqrt(100.0 * t * t + 0.25)
        wanted = np.sqrt(table[following]) * (out * clean + skip * x) + np.sqrt(1 - table[following]) * fresh[step + 1]
        assert np.abs(inputs[step + 1] - wanted).max() < 1e-5 * max(1.0, np.abs(clean).max()), step
        plain = theirs.step(torch.tensor(answer).float(), theirs.timesteps[step], torch.tensor(x).float(), generator)
        if getattr(formula, "snr_shift_scale", 1.0) == 1.0:
            assert np.abs(plain.prev_sample.numpy() - inputs[step + 1]).max() < 1e-6 * max(1.0, np.abs(clean).max())
    assert set(drawn(family.objective, 60).tolist()) == set(WHOLE)
    moved = drawn(training_objective(family.objective, load_section("loss", timestep_jitter=3.0)), 200)
    assert moved.max() == 999
    assert set(moved.tolist()) <= {*range(996, 1000), *range(755, 762), *range(256, 263)}
    assert len(set(moved.tolist())) > 12
    if case.name == "diffusers":
        file = folder / "scheduler" / "scheduler_config.json"
        betas = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}
        file.write_text(json.dumps({"_class_name": "LCMScheduler", **betas}))
        assert own_timesteps(tiny_family("diffusers", folder, timesteps="scheduler", **FEW, **SMALL)) == (999, 679, 339)
