"""Few-step models: draws, sampling and wrong input; against float32 numbers, and loops of its own in float64.

Sampling that draws new noise is held to diffusers' FlowMatchLCMScheduler and FlowMatchEulerDiscreteScheduler too.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchLCMScheduler, WanPipeline
from torch import nn

from qvgen.cli import main
from qvgen.config.defaults import load_section
from qvgen.config.leaves import load_leaf
from qvgen.errors import UserError
from qvgen.initializers.prepare import PrepareConfig, prepare
from qvgen.layers.swap import quantized_layers
from qvgen.models.few_step import FewSteps, caption_dropout, own_timesteps, sampling_steps
from qvgen.models.objectives import FlowMatching, VPrediction
from qvgen.training.loss.noise_level import training_objective
from tests.models.family_checks import tiny_family
from tests.models.hub_folders import CAPTIONS, make_cogvideox_folder, make_wan_folder
from tests.profiles import make_profile

STEPS = (1000.0, 757.0, 522.0)
FEW = FewSteps(objective=FlowMatching(shift=3.0), timesteps=STEPS)


def drawn(objective: Any, count: int) -> torch.Tensor:
    """Timesteps that as many samples get."""
    sigmas = [objective.sample_sigma(generator=torch.Generator().manual_seed(seed)) for seed in range(count)]
    return objective.timestep(torch.stack(sigmas))


def test_draws_are_its_timesteps_and_no_others() -> None:
    """Each a third of 900 draws, to three standard deviations (14), and the very float32 number that sampling has."""
    found = Counter(drawn(FEW, 900).tolist())
    assert set(found) == set(STEPS)
    assert all(abs(count - 300) < 3 * 14.2 for count in found.values())


def test_jitter_moves_a_timestep_by_less_than_it_says() -> None:
    jittered = training_objective(FEW, load_section("loss", timestep_jitter=5.0))
    exact, moved = drawn(FEW, 400), drawn(jittered, 400)
    distance = moved - exact
    assert distance.abs().max() <= 5.0 + 1e-3  # a float32 of 1000 is exact to 6e-5
    assert moved.max() <= 1000
    inner = distance[exact < 1000]
    assert inner.min() < -4.5
    assert inner.max() > 4.5
    assert len(set(moved.tolist())) > 200


def test_a_sample_draws_one_number_as_an_ordinary_model_does() -> None:
    """So that its noise and caption dropout are the same."""
    first, second = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    FEW.sample_sigma(generator=first)
    FlowMatching(shift=3.0).sample_sigma(generator=second)
    assert torch.equal(torch.rand(4, generator=first), torch.rand(4, generator=second))


def test_noise_is_the_formulas_own() -> None:
    clean, noise = torch.randn(2, 3, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    sigma = torch.tensor([1.0, 0.757, 0.522])
    wanted = (1 - sigma.double().numpy()[:, None, None, None, None]) * clean.double().numpy()
    wanted += sigma.double().numpy()[:, None, None, None, None] * noise.double().numpy()
    assert np.abs(FEW.add_noise(clean, noise, sigma=sigma).numpy() - wanted).max() < 1e-6
    assert torch.equal(FEW.target(clean, noise, sigma=sigma), noise - clean)
    discrete = FewSteps(objective=VPrediction(), timesteps=(999.0, 499.0))
    assert set(drawn(discrete, 40).tolist()) == {999.0, 499.0}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"timestep_jitter": 120.0},
            "loss.timestep_jitter=120 mixes timesteps that are 235 apart; use less than 117.5",
        ),
        ({"levels": "logit_normal"}, "loss.levels=logit_normal"),
        ({"level_shift": 2.0}, "trained at its own timesteps"),
    ],
)
def test_other_draws_are_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        training_objective(FEW, load_section("loss", **change))
    with pytest.raises(UserError, match="this model has none"):
        training_objective(FlowMatching(), load_section("loss", timestep_jitter=1.0))


def called_at(transformer: nn.Module) -> tuple[list[float], list[torch.Tensor]]:
    """Timesteps that calls of a transformer will have, and what it will answer."""
    timesteps: list[float] = []
    answers: list[torch.Tensor] = []

    def look(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        timesteps.extend(kwargs["timestep"].reshape(len(kwargs["timestep"]), -1)[:, 0].tolist())
        answers.append(output[0])

    transformer.register_forward_hook(look, with_kwargs=True)
    return timesteps, answers


def by_hand(answers: list[torch.Tensor], *, seed: int, sampler: str | None) -> np.ndarray:
    """The sample that float64 steps end at, from the answers of a transformer: Euler's, or to the clean sample and back.

    All noise is of one generator: the first, then that of each step.
    """
    generator = torch.Generator().manual_seed(seed)

    def noise() -> np.ndarray:
        return torch.randn(answers[0].shape, generator=generator).double().numpy()

    x = noise()
    for high, low, answer in zip(STEPS, [*STEPS[1:], 0.0], answers, strict=True):
        velocity = answer.double().numpy()
        if sampler is None:
            x = x + (low - high) / 1000 * velocity
        else:
            x = (1 - low / 1000) * (x - high / 1000 * velocity) + low / 1000 * noise()
    return x


@pytest.mark.parametrize("sampler", [None, "lcm"])
def test_tiny_takes_its_own_steps(sampler: str | None) -> None:
    """The levels of the timesteps, by a loop in float64 over what the transformer answered; to a level of 255."""
    changes = {"timesteps": list(STEPS), "num_inference_steps": 3, "guidance_scale": 1.0, "sampler": sampler}
    family = load_leaf("model", "tiny", **changes)
    transformer = family.load_teacher()
    timesteps, answers = called_at(transformer)
    options = {"num_steps": 3, "guidance_scale": 1.0}
    (video,) = family.generate(transformer, [family.prompts[0]], [5], **options)
    assert timesteps == list(STEPS)
    x = by_hand(answers, seed=5, sampler=sampler)[0]
    wanted = np.round((np.clip(x, -1, 1) + 1) * 127.5).transpose(1, 2, 3, 0)
    assert np.abs(video.numpy().astype(float) - wanted).max() <= 1
    # Beside another video, and once more: a video's noise is its seed's alone.
    several = family.generate(transformer, family.prompts[1::-1], [9, 5], **options)
    assert (several[1].int() - video.int()).abs().max() <= 1  # products of a larger batch add up in another order
    assert torch.equal(family.generate(transformer, [family.prompts[0]], [5], **options)[0], video)


@pytest.mark.parametrize("scheduler", ["FlowMatchEulerDiscreteScheduler", "UniPCMultistepScheduler"])
def test_wan_takes_its_own_steps(scheduler: str, tmp_path: Path) -> None:
    """The transformer is told the given numbers, which UniPC would round; with guidance held, once a step."""
    folder = make_wan_folder(tmp_path / "hub")
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(file.read_text(encoding="utf-8").replace("UniPCMultistepScheduler", scheduler), encoding="utf-8")
    steps = [1000, 757.5, 522]
    family = tiny_family(
        "wan", folder, timesteps=steps, num_inference_steps=3, guidance_scale=1.0, guidance_distilled=True
    )
    transformer = family.load_teacher()
    timesteps, _ = called_at(transformer)
    family.generate(transformer, CAPTIONS[:1], [0], num_steps=3, guidance_scale=1.0)
    assert timesteps == steps
    assert own_timesteps(family) == tuple(steps)
    assert set(drawn(family.objective, 60).tolist()) == set(steps)
    assert (sampling_steps(family, 10), caption_dropout(family, 0.5)) == (3, 0.0)


def write_scheduler(folder: Path, **config: Any) -> None:
    """Put another scheduler into a model's folder."""
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config), encoding="utf-8")


def lcm_latents(family: Any, transformer: nn.Module, *, seed: int) -> torch.Tensor:
    """Latents of diffusers' pipeline and FlowMatchLCMScheduler, used as they come; all noise is the global generator's."""

    class Visiting(FlowMatchLCMScheduler):
        def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
            super().set_timesteps(num_inference_steps, device=device, sigmas=[step / 1000 for step in STEPS])
            self.timesteps = torch.tensor(STEPS)

    parts = {"tokenizer": None, "text_encoder": None, "vae": family._module("vae"), "scheduler": Visiting()}
    pipeline = WanPipeline(transformer=transformer, **parts)
    pipeline.set_progress_bar_config(disable=True)
    torch.manual_seed(seed)
    sizes = {"num_frames": family.sampling_frames, "height": family.height, "width": family.width}
    embeddings = family.encode(CAPTIONS[:1])["encoder_hidden_states"].to(transformer.dtype)
    return pipeline(
        prompt_embeds=embeddings, num_inference_steps=3, guidance_scale=1.0, output_type="latent", **sizes
    ).frames


def test_wan_draws_new_noise_in_each_step(tmp_path: Path) -> None:
    """``sampler=lcm`` over any folder's scheduler: diffusers' own class, to the bit, and a loop in float64.

    Two schedulers of diffusers do the same; a folder with the other one is sampled like it.
    """
    folder = make_wan_folder(tmp_path / "hub")
    few = {"timesteps": list(STEPS), "num_inference_steps": 3, "guidance_scale": 1.0}
    family = tiny_family("wan", folder, sampler="lcm", **few)
    transformer = family.load_teacher(dtype=torch.float32)
    latents: list[torch.Tensor] = []
    decode = family._decode_sampled
    family._decode_sampled = lambda found, **options: latents.append(found) or decode(found, **options)
    timesteps, answers = called_at(transformer)
    video = family.generate(transformer, CAPTIONS[:1], [7], num_steps=3, guidance_scale=1.0)
    assert timesteps == list(STEPS)
    assert own_timesteps(family) == STEPS
    wanted = by_hand(answers, seed=7, sampler="lcm")
    assert np.abs(latents[0].double().numpy() - wanted).max() < 2e-6 * np.abs(wanted).max()
    assert torch.equal(latents[0], lcm_latents(family, transformer, seed=7))
    two = family.generate(transformer, CAPTIONS[1::-1], [3, 7], num_steps=3, guidance_scale=1.0)
    assert torch.equal(two[1], video[0])  # one after another: each has a generator of its own
    write_scheduler(folder, _class_name="FlowMatchEulerDiscreteScheduler", shift=3.0, stochastic_sampling=True)
    stochastic = tiny_family("wan", folder, **few).generate(
        transformer, CAPTIONS[:1], [7], num_steps=3, guidance_scale=1.0
    )
    assert torch.equal(stochastic, video)
    plain = tiny_family("wan", make_wan_folder(tmp_path / "plain"), **few)
    assert not torch.equal(plain.generate(transformer, CAPTIONS[:1], [7], num_steps=3, guidance_scale=1.0), video)
    experts = tiny_family(
        "wan2.2-a14b", make_wan_folder(tmp_path / "a14b", "a14b"), expert="low", sampler="lcm", timesteps="scheduler",
        num_inference_steps=3,
    )  # fmt: skip
    low = experts.load_teacher()
    timesteps, _ = called_at(low)
    experts.generate(low, CAPTIONS[:1], [0], num_steps=3, guidance_scale=1.0)
    assert timesteps == list(own_timesteps(experts) or ())


def test_the_schedulers_own_steps(tmp_path: Path) -> None:
    """``scheduler``: draws are what sampling visits, in Wan and in CogVideoX; an expert has its part of them."""
    for name, folder in (
        ("wan", make_wan_folder(tmp_path / "wan")),
        ("cogvideox", make_cogvideox_folder(tmp_path / "cogvideox")),
    ):
        family = tiny_family(name, folder, timesteps="scheduler", num_inference_steps=3)
        transformer = family.load_teacher()
        timesteps, _ = called_at(transformer)
        family.generate(transformer, CAPTIONS[:1], [0], num_steps=3, guidance_scale=1.0)
        assert list(own_timesteps(family) or ()) == timesteps
        assert set(drawn(family.objective, 60).tolist()) == set(timesteps)
    steps = [1000, 940, 850, 600]
    for expert, own in (("high", (1000.0, 940.0)), ("low", (850.0, 600.0))):
        changes = {"expert": expert, "timesteps": steps, "num_inference_steps": 4}
        family = tiny_family("wan2.2-a14b", make_wan_folder(tmp_path / expert, "a14b"), **changes)
        assert family.own_timesteps == own
        assert set(drawn(family.objective, 40).tolist()) == set(own)
    none = tiny_family("wan2.2-a14b", family.path, expert="low", timesteps=[1000, 990], num_inference_steps=2)
    with pytest.raises(ValueError, match=r"model.timesteps=\[1000.0, 990.0\]: the transformer .* at none of them"):
        assert none.objective


def test_every_timestep_has_a_band_of_its_own() -> None:
    """Between two of them, where jitter leads, a factor is between theirs; others of the batch don't matter."""
    model = load_leaf("model", "tiny").load_teacher()
    prepare(
        model,
        PrepareConfig(profile=make_profile("paper"), initializer=load_leaf("init", "rtn"), timesteps=STEPS),
    )
    band = next(iter(quantized_layers(model).values())).noise_band
    assert (band.num_bands, band.timesteps) == (3, (522.0, 757.0, 1000.0))
    band.set_timestep(torch.tensor([1000.0, 522.0, 757.0, 752.0]))
    assert band.sample_bands() == [2, 0, 1, 1]
    table = torch.tensor([0.1, 0.2, 0.4])
    found = band.row_values(table, torch.zeros(4, 1)).tolist()
    assert found == pytest.approx([0.4, 0.1, 0.2, 0.1 + 0.1 * 230 / 235])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["model.timesteps=[757,1000,522]"], "does not fall; write them in the order of sampling: [1000,757,522]"),
        (["model.timesteps=[1000,757,757]"], "model.timesteps=[1000,757,757] does not fall"),
        (["model.timesteps=[1200,757,522]"], "1200 is outside of the schedule; timesteps are above 0 and at most 1000"),
        (["model.timesteps=[1000,757,0]"], "0 is outside of the schedule"),
        (["model.timesteps=fast"], "model.timesteps=fast is no list of numbers; write for example [1000,757,522]"),
        (["model.timesteps=[]"], "model.timesteps=[] is no list of numbers"),
        (
            ["model.timesteps=[1000,757,522]", "model.num_inference_steps=5"],
            "model.num_inference_steps=5, and model.timesteps=[1000,757,522] has 3; write model.num_inference_steps=3",
        ),
        (["model.guidance_distilled=true"], "model.guidance_scale=2 with model.guidance_distilled=true"),
        (["model.guidance_distilled=1"], "guidance_distilled"),
        (["loss.timestep_jitter=2"], "this model has none (model.timesteps); leave it out"),
        (["method=few_step"], "method=few_step distills into a few steps, and model=tiny has none"),
        (["model.sampler=lcm"], "model.timesteps is null; write for example model.timesteps=[1000,757,522]"),
        (["model=tiny_fewstep", "model.sampler=lmc"], "model.sampler=lmc is not known; write lcm, or null"),
        (
            ["model=cogvideox", "model.timesteps=[999,499]", "model.num_inference_steps=2"],
            "a CogVideoXDDIMScheduler steps to timesteps of its own; write model.timesteps=scheduler, or model.sampler=lcm",
        ),
        (
            ["model=latte", "model.timesteps=[999,499.5]", "model.num_inference_steps=2", "model.sampler=lcm"],
            "model.timesteps=[999,499.5]: 499.5 is no whole number up to 999, which this model's timesteps are",
        ),
        (
            ["model=cogvideox", "model.timesteps=[1000,499]", "model.num_inference_steps=2", "model.sampler=lcm"],
            "1000 is no whole number up to 999",
        ),
        (
            ["model=mochi", "model.timesteps=[500,499.9]", "model.num_inference_steps=2"],
            "500 and 499.9 are one timestep for the transformer of model=mochi, which is told them in bfloat16; write others",
        ),
    ],
)
def test_what_is_wrong_is_one_line(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    further = ["model.num_inference_steps=3"] if len(words) == 1 and words[0].startswith("model.timesteps=[") else []
    assert main(["train", "dry_run=true", *words, *further]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["num_steps=8"], "num_steps=8: model=tiny_fewstep is a few-step model of 4 steps (model.timesteps)"),
        (
            ["guidance_scale=2"],
            "guidance_scale=2 with model.guidance_distilled=true: the weights of model=tiny_fewstep",
        ),
    ],
)
def test_sampling_otherwise_is_one_line(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", "model=tiny_fewstep", f"out={tmp_path / 'out'}", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
