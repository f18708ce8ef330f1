"""Mochi over a tiny folder, against the plain diffusers pipeline, direct calls, and the scheduler with its own steps.

Its time is reversed, and attention reads no padding of a caption.
"""

import json
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, MochiPipeline
from diffusers.pipelines.mochi.pipeline_mochi import linear_quadratic_schedule

from qvgen.config.leaves import load_leaf
from qvgen.models.base import VideoDiT, example_condition
from qvgen.models.linear_quadratic import linear_quadratic_level
from qvgen.models.mochi import ReversedFlow
from tests.models.family_checks import (
    check_generation_equals_the_pipeline,
    check_one_training_step,
    check_packed_equals_fake_quantized,
    check_prediction_is_per_sample,
    draw,
    tiny_family,
)
from tests.models.further_folders import make_mochi_folder
from tests.models.hub_folders import CAPTIONS

FRAMES = {"num_frames": 7, "sampling_frames": 7}
pytestmark = pytest.mark.filterwarnings("ignore:In CPU autocast")  # the transformer turns it off, in its own way


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory):
    """Family, transformer and plain pipeline of one folder."""
    folder = make_mochi_folder(tmp_path_factory.mktemp("hub") / "mochi")
    family = tiny_family("mochi", folder, **FRAMES)
    pipeline = MochiPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return family, family.load_teacher(), pipeline


def test_it_is_a_family_and_loads_what_was_saved(made) -> None:
    family, teacher, pipeline = made
    assert isinstance(family, VideoDiT)
    saved = pipeline.transformer.state_dict()
    assert all(torch.equal(value, saved[key]) for key, value in teacher.state_dict().items())
    assert family.sample_shape == (12, 2, 4, 6)


def test_captions_are_encoded_as_the_pipeline_does(made, tmp_path: Path) -> None:
    """With their masks; the empty caption may be zeros, which is another revision of the texts."""
    family, _, pipeline = made
    found = family.encode([*CAPTIONS, ""])
    shapes = example_condition(family, count=3, make=torch.empty)
    assert {name: value.shape for name, value in found.items()} == {name: value.shape for name, value in shapes.items()}
    for row, caption in enumerate([*CAPTIONS, ""]):
        with torch.no_grad():
            embeds, mask, *_ = pipeline.encode_prompt(caption, do_classifier_free_guidance=False)
        assert torch.equal(embeds[0], found["encoder_hidden_states"][row])
        assert torch.equal(mask[0].float(), found["encoder_attention_mask"][row])
        assert mask.sum() == len(pipeline.tokenizer(caption).input_ids)
    zeros = tiny_family("mochi", make_mochi_folder(tmp_path / "zeros", "zeros"), **FRAMES)
    assert not zeros.encode([""])["encoder_attention_mask"].any()
    assert zeros.text_revision != family.text_revision


def test_latents_are_normalized_and_decoded_as_the_pipeline_does(made) -> None:
    family, _, pipeline = made
    pixels = torch.rand(2, 3, 7, family.height, family.width) * 2 - 1
    latents = family.encode_video(pixels)
    assert latents.shape == (2, *family.sample_shape)
    config = pipeline.vae.config
    mean, deviation = (torch.tensor(value).view(1, -1, 1, 1, 1) for value in (config.latents_mean, config.latents_std))
    with torch.no_grad():
        raw = pipeline.vae.encode(pixels).latent_dist.mode()
        decoded = pipeline.vae.decode(raw).sample
    assert torch.allclose(latents, (raw - mean) / deviation, atol=1e-5)
    assert torch.allclose(family.decode(latents), decoded, atol=1e-4)  # normalizing and back costs two roundings
    with pytest.raises(ValueError, match="a clip of 9x32x48 does not fit mochi: frames must be 6 n"):
        family.encode_video(torch.zeros(1, 3, 9, 32, 48))


def test_prediction_is_the_transformers(made) -> None:
    family, teacher, _ = made
    noisy, timestep, condition = draw(family)
    with torch.no_grad():
        found = family.predict(teacher, noisy, timestep, condition)
        masks = {**condition, "encoder_attention_mask": condition["encoder_attention_mask"].bool()}
        assert torch.equal(found, teacher(noisy, timestep=timestep, **masks, return_dict=False)[0])
    check_prediction_is_per_sample(family, teacher)


def test_generation_equals_the_pipelines(made) -> None:
    check_generation_equals_the_pipeline(*made)


def test_training_step(made) -> None:
    family, teacher, _ = made
    check_one_training_step(family, teacher)


def test_packed_video_equals_the_fake_quantized_one(made, tmp_path: Path) -> None:
    family, teacher, _ = made
    check_packed_equals_fake_quantized(family, teacher, tmp_path / "packed")


def test_the_objective_is_what_the_scheduler_undoes(made) -> None:
    """Levels, timesteps, noised samples and the way back, to 1e-6, by the pipeline's own steps."""
    family = made[0]
    scheduler = family.scheduler()
    scheduler.set_timesteps(sigmas=linear_quadratic_schedule(8, 0.025))
    objective = family.objective
    assert isinstance(objective, ReversedFlow)
    sigma = linear_quadratic_level(torch.arange(8) / 8)
    assert torch.allclose(1 - sigma, scheduler.sigmas[:-1], atol=1e-6)
    assert torch.allclose(objective.timestep(sigma), scheduler.timesteps, atol=1e-3)
    generator = torch.Generator().manual_seed(0)
    clean, noise = (torch.randn(8, 12, 2, 4, 6, generator=generator) for _ in range(2))
    noisy, target = objective.add_noise(clean, noise, sigma=sigma), objective.target(clean, noise, sigma=sigma)
    plain = FlowMatchEulerDiscreteScheduler()  # its own scale_noise does not know that the levels are inverted
    plain.set_timesteps(sigmas=linear_quadratic_schedule(8, 0.025))
    assert torch.allclose(noisy, plain.scale_noise(clean, plain.timesteps, noise), atol=1e-6)
    scheduler.set_begin_index(0)
    sample = noise[:1]
    for step, t in enumerate(scheduler.timesteps):
        assert torch.allclose(
            sample, objective.add_noise(clean[:1], noise[:1], sigma=sigma[step : step + 1]), atol=1e-5
        )
        sample = scheduler.step(target[:1], t, sample, return_dict=False)[0]
    assert torch.allclose(sample, clean[:1], atol=1e-5)  # eight steps in float32
    timestep = objective.timestep(sigma)
    assert torch.allclose(objective.noise(target, noisy=noisy, timestep=timestep), noise, atol=1e-5)
    signal, spread = objective.signal_and_noise(timestep)
    assert torch.allclose(signal, 1 - sigma, atol=1e-6)
    assert torch.allclose(spread, sigma, atol=1e-6)


def test_noise_is_drawn_as_the_steps_lie() -> None:
    """Half of the draws above 0.975; the draws' distribution against the schedule of 1000 steps."""
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([ReversedFlow().sample_sigma(generator=generator) for _ in range(2000)]).sort().values
    steps = torch.tensor(linear_quadratic_schedule(2000, 0.025)).sort().values
    assert (
        draws - steps
    ).abs().max() < 0.05  # Kolmogorov's bound at 1e-3 for 2000 draws, times the largest slope, 3.85 / 2
    assert 0 < draws.min() < draws.max() <= 1


def test_what_it_is_not_made_for_is_refused(tmp_path: Path) -> None:
    for changes, message in (
        ({"num_frames": 9}, "model.num_frames=9 is not 1 more than a multiple of 6; use 7"),
        ({**FRAMES, "width": 40}, r"model.width=40 is no multiple of 16, VAE times patches; use 32"),
    ):
        with pytest.raises(ValueError, match=message):
            tiny_family("mochi", None, **changes)
    folder = make_mochi_folder(tmp_path / "hub")
    path = folder / "scheduler" / "scheduler_config.json"
    config = json.loads(path.read_text())
    for key, value, wanted in (("invert_sigmas", False, True), ("shift", 3.0, 1.0)):
        path.write_text(json.dumps({**config, key: value}))
        with pytest.raises(ValueError, match=f"mochi's scheduler has {key}={value}; {wanted} is supported"):
            _ = tiny_family("mochi", folder, **FRAMES).objective


def test_the_authors_sampling() -> None:
    """demos/cli.py of the authors' code: num_steps, cfg_scale, num_frames; 30 frames per second."""
    family = load_leaf("model", "mochi")
    found = family.num_inference_steps, family.guidance_scale, family.sampling_frames, family.fps
    assert found == (64, 4.5, 163, 30)
