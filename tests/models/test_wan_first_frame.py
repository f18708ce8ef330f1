"""Wan2.2-TI2V-5B from an image, over a tiny folder: against diffusers' WanImageToVideoPipeline, call by call and whole.

The first latent frame is the image's own and its tokens have a timestep of 0; a sample is the frames behind it.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import WanImageToVideoPipeline
from PIL import Image

import qvgen
from qvgen.config.leaves import load_leaf
from qvgen.config.prompts.image_prompt import ImagePrompt
from qvgen.config.prompts.prompt import Prompts
from qvgen.data.noise import NoisyBatch
from qvgen.errors import UserError
from qvgen.evaluation.compared_calls import compared_calls
from qvgen.evaluation.sampled_inputs import SampledInputs
from qvgen.evaluation.sampled_teacher import SampledTeacher
from qvgen.initializers.prepare import PrepareConfig
from qvgen.layers.noise_band import NoiseBand
from qvgen.layers.swap import quantized_layers
from qvgen.methods.base import OdeWindow
from qvgen.models.base import VideoDiT, example_condition
from qvgen.models.given_image import check_images
from qvgen.models.named_family import NamedFamily
from qvgen.training.loss.ode_window import window_velocity
from qvgen.training.loss.prediction_loss import prediction_loss
from tests.models.family_checks import check_packed_equals_fake_quantized, tiny_family
from tests.models.hub_folders import CAPTIONS, make_wan_folder
from tests.models.image_folders import clip_of, write_image
from tests.profiles import make_profile

NAME = "wan2.2-i2v-5b"
SIZE = {"height": 32, "width": 64}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory):
    """Family, its transformer, diffusers' pipeline, and an image of the family's own size."""
    root = tmp_path_factory.mktemp("hub")
    family = tiny_family(NAME, make_wan_folder(root / "model", "ti2v"), width=64)
    pipeline = WanImageToVideoPipeline.from_pretrained(root / "model", local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return family, family.load_teacher(), pipeline, write_image(root / "image.png", **SIZE)


def _draw(family: Any, image: Path) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Noisy latents, timesteps and condition of two samples at two noise levels, with an image each."""
    clip = clip_of(image, frames=9)
    condition = {**family.encode(CAPTIONS), **family.encode_first_frame(torch.cat([clip, clip.flip(-1)]))}
    noisy = torch.randn(2, *family.sample_shape, generator=torch.Generator().manual_seed(0))
    return noisy, torch.tensor([900.0, 100.0]), condition


def test_a_clip_becomes_the_image_and_the_frames_behind_it(made) -> None:
    """The image's latents are ``prepare_latents``'s, and those of the clip's own first frame; the sample has the others."""
    family, _, pipeline, image = made
    assert isinstance(family, VideoDiT)
    assert family.sample_shape == (8, 2, 2, 4)
    clip = clip_of(image, frames=9)
    with torch.no_grad():
        found = family.encode_first_frame(clip)
        _, wanted, mask = pipeline.prepare_latents(clip[:, :, 0], 1, 8, 32, 64, 9, torch.float32, torch.device("cpu"))
        whole = family._normalize(pipeline.vae.encode(clip).latent_dist.mode())
    assert mask.flatten(2).sum(-1).item() == 2 * 2 * 4
    assert {"image_latents": found["image_latents"].shape} == {
        key: value.shape
        for key, value in example_condition(family, count=1, make=torch.zeros).items()
        if key != "encoder_hidden_states"
    }
    assert torch.allclose(found["image_latents"], wanted, atol=1e-6)
    assert torch.allclose(whole[:, :, :1], wanted, atol=1e-5)
    assert torch.equal(family.encode_video(clip), whole[:, :, 1:])
    assert family.latent_revision != tiny_family("wan2.2-ti2v", family.path, width=64).latent_revision


def test_prediction_is_each_call_of_the_pipeline(made) -> None:
    """Bitwise, with the caption and without: the image in front, 0 for its tokens, and the others' answers alone."""
    family, teacher, pipeline, image = made
    calls: list[tuple[dict[str, Any], torch.Tensor]] = []
    handle = pipeline.transformer.register_forward_hook(
        lambda model, args, named, output: calls.append((named, output[0])), with_kwargs=True
    )
    pipeline(
        image=Image.open(image), prompt=CAPTIONS[0], **SIZE, num_frames=9, num_inference_steps=2, guidance_scale=4.0,
        generator=torch.Generator().manual_seed(7), output_type="latent",
    )  # fmt: skip
    handle.remove()
    first = family.encode_first_frame(clip_of(image, frames=9))
    assert len(calls) == 4
    for named, output in calls:
        video, timestep = named["hidden_states"], named["timestep"]
        assert timestep.shape == (1, 6)
        assert timestep[0, :2].eq(0).all()
        assert timestep[0, 2:].eq(timestep.max()).all()
        assert timestep.max() > 0
        assert torch.allclose(video[:, :, :1], first["image_latents"], atol=1e-6)
        told = {"encoder_hidden_states": named["encoder_hidden_states"], "image_latents": video[:, :, :1]}
        with torch.no_grad():
            found = family.predict(teacher, video[:, :, 1:], timestep.amax(dim=1), told)
        assert torch.equal(found, output[:, :, 1:])


def test_prediction_is_of_a_sample_s_own_timestep_caption_and_image(made) -> None:
    family, teacher, _, image = made
    noisy, timestep, condition = _draw(family, image)
    with torch.no_grad():
        found = family.predict(teacher, noisy, timestep, condition)
        assert found.shape == noisy.shape
        alone = {key: value[1:] for key, value in condition.items()}
        assert torch.allclose(family.predict(teacher, noisy[1:], timestep[1:], alone)[0], found[1], atol=1e-5)
        for key in condition:
            swapped = {**condition, key: condition[key].flip(0)}
            assert not torch.equal(family.predict(teacher, noisy, timestep, swapped), found)


def test_objective_is_what_the_scheduler_undoes(made) -> None:
    family = made[0]
    scheduler, objective = family.scheduler(), family.objective
    generator = torch.Generator().manual_seed(0)
    clean, noise = (torch.randn(1, *family.sample_shape, generator=generator) for _ in range(2))
    scheduler.set_timesteps(4)
    for index, t in enumerate(scheduler.timesteps.tolist()):
        scheduler._step_index = index
        sigma = scheduler.sigmas[index][None]
        assert abs(float(sigma) - t / 1000) < 1e-3  # its timesteps are whole numbers
        noisy, target = (make(clean, noise, sigma=sigma) for make in (objective.add_noise, objective.target))
        assert torch.allclose(scheduler.convert_model_output(target, sample=noisy), clean, atol=1e-6)


def _student(family: Any, teacher: torch.nn.Module) -> torch.nn.Module:
    student = copy.deepcopy(teacher)
    profile = make_profile("paper", weight_bits=4, activation_bits=4)
    qvgen.prepare(student, PrepareConfig(profile=profile, initializer=load_leaf("init", "rtn")))
    return student


def test_all_tokens_of_a_sample_are_in_the_band_of_its_noisy_ones(made) -> None:
    """Clips of the clean frame's own timestep, 0, are heard by no sample; those of a sample's timestep by it alone."""
    family, teacher, _, image = made
    student = _student(family, teacher)
    noisy, timestep, condition = _draw(family, image)
    bands = NoiseBand(next(iter(quantized_layers(student).values())).activation_quantizer.clip_low.numel())
    bands.set_timestep(timestep)
    own = bands.sample_bands()
    assert len({0, *own}) == 3

    def heard(band: int) -> list[bool]:
        changed = copy.deepcopy(student)
        for layer in quantized_layers(changed).values():
            layer.activation_quantizer.clip_low.data[band] -= 2.0
        after = family.predict(changed, noisy, timestep, condition)
        return [not torch.equal(a, b) for a, b in zip(after, before, strict=True)]

    with torch.no_grad():
        before = family.predict(student, noisy, timestep, condition)
        assert heard(0) == [False, False]
        assert heard(own[0]) == [True, False]
        assert heard(own[1]) == [False, True]


def test_the_loss_is_of_the_frames_that_are_predicted(made) -> None:
    """Whatever a student answers for the image changes nothing; for the other frames it does."""
    family, teacher, _, image = made
    student = _student(family, teacher)
    noisy, timestep, condition = _draw(family, image)
    batch = NoisyBatch(noisy=noisy, timestep=timestep, target=torch.zeros_like(noisy), captions=CAPTIONS)
    offsets = torch.zeros(1, 1, 3, 1, 1)
    student.register_forward_hook(lambda model, args, output: (output[0] + offsets,))

    def losses() -> list[torch.Tensor]:
        found = []
        for name, given in (("kd", teacher), ("lsq", None)):
            method = load_leaf("method", name)
            assert method.needs_teacher == (given is not None)
            found.append(prediction_loss(family, student, batch, condition, method=method, teacher=given))
        return found

    with torch.no_grad():
        plain = losses()
        offsets[:, :, 0] = 9.0
        assert all(torch.equal(a, b) for a, b in zip(losses(), plain, strict=True))
        offsets[:, :, 2] = 9.0
        assert not any(torch.equal(a, b) for a, b in zip(losses(), plain, strict=True))


def test_errors_of_sampled_calls_are_of_the_frames_and_at_the_timestep_that_count(made) -> None:
    """Without clips too, and in an evaluation: a model that differs in its answer for the image alone has no error."""
    family, teacher, _, image = made
    other, offsets = copy.deepcopy(teacher), torch.zeros(1, 1, 3, 1, 1)
    offsets[:, :, 0] = 9.0
    other.register_forward_hook(lambda model, args, output: (output[0] + offsets,))
    prompts = Prompts.of([ImagePrompt(CAPTIONS[0], str(image))])
    model = NamedFamily(name=NAME, family=family, section={})
    sampled = SampledTeacher(model=model, transformer=teacher, encode=family.encode, seed=7)
    inputs = SampledInputs(sampled, prompts=prompts, num_samples=2, num_steps=2)
    exact = list(inputs.predictions(teacher))
    assert exact[0].shape[1:] == family.sample_shape
    assert inputs.relative_error(other, exact) == 0

    def sample() -> object:
        return family.generate(teacher, prompts.captions, [7], num_steps=2, guidance_scale=1.0)

    scheduler = family.scheduler()
    scheduler.set_timesteps(2)
    calls = compared_calls(teacher, other, sample, family=family)
    assert [call.timestep for call in calls] == scheduler.timesteps.tolist()
    assert all(torch.equal(call.output, call.reference) for call in calls)
    offsets[:, :, 1] = 9.0
    assert inputs.relative_error(other, exact) > 0


def test_videos_equal_the_pipelines(made, tmp_path: Path) -> None:
    """Bitwise, of images of the model's size and of another; without an image it is refused by name."""
    family, teacher, pipeline, image = made
    large = write_image(tmp_path / "large.png", height=60, width=70, shade=90)
    prompts = [ImagePrompt(CAPTIONS[0], str(image)), ImagePrompt(CAPTIONS[0], str(large))]
    videos = family.generate(teacher, prompts, [7, 7], num_steps=2, guidance_scale=4.0)
    for video, file in zip(videos, (image, large), strict=True):
        frames = pipeline(
            image=Image.open(file), prompt=CAPTIONS[0], **SIZE, num_frames=9, num_inference_steps=2, guidance_scale=4.0,
            negative_prompt=family.negative_prompt, generator=torch.Generator().manual_seed(7), output_type="pil",
        ).frames[0]  # fmt: skip
        assert np.array_equal(video.numpy(), np.stack([np.asarray(frame) for frame in frames]))
    assert not torch.equal(videos[0], videos[1])
    with pytest.raises(UserError, match=f"model={NAME} makes .* 'a red boat' has none"):
        family.generate(teacher, CAPTIONS[:1], [7], num_steps=2, guidance_scale=4.0)


def test_packed_video_equals_the_fake_quantized_one(made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family, teacher, _, image = made
    prompts = [ImagePrompt(caption, str(image)) for caption in CAPTIONS]
    monkeypatch.setattr("tests.models.family_checks.CAPTIONS", prompts)
    check_packed_equals_fake_quantized(family, teacher, tmp_path / "packed")


def test_guided_small_steps_of_a_teacher_keep_the_image(made) -> None:
    """One small step from t to 0 is the teacher's velocity away from the negative prompt, the image in both calls."""
    _, teacher, _, image = made
    family = tiny_family(NAME, made[0].path, width=64, timesteps=[900, 100], num_inference_steps=2)
    noisy, timestep, condition = _draw(family, image)
    batch = NoisyBatch(noisy=noisy, timestep=timestep, target=noisy, captions=CAPTIONS)
    window = OdeWindow(substeps=1, guidance_scale=3.0)
    found = window_velocity(family, teacher, batch, condition, encode=family.encode, window=window)
    negative = {**condition, **family.encode([family.negative_prompt] * 2)}
    with torch.no_grad():
        with_caption, without = (family.predict(teacher, noisy, timestep, told) for told in (condition, negative))
    assert torch.allclose(found, without + 3.0 * (with_caption - without), atol=1e-4)


def test_what_it_is_not_made_for_is_refused(made) -> None:
    family, _, _, image = made
    for changes in ({"num_frames": 1}, {"sampling_frames": 1}):
        ((key, _),) = changes.items()
        with pytest.raises(ValueError, match=rf"model.{key}=1: model={NAME} predicts .*use 5 frames or more"):
            tiny_family(NAME, None, width=64, **changes)
    with pytest.raises(ValueError, match=r"a clip of 1x32x64: .* there is none; use 5 frames or more"):
        family.check_clip(frames=1, height=32, width=64)
    text = tiny_family("wan2.2-ti2v", family.path, width=64)
    with pytest.raises(UserError, match=f"model=wan2.2-ti2v makes a video of a caption alone, .* or use model={NAME}$"):
        check_images(text, [ImagePrompt("a boat", str(image))], key="prompts")
