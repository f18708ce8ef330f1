"""HunyuanVideo 1.5 from an image, over a tiny folder: against diffusers' pipeline, call by call and whole.

The pipeline chooses a video's size by the image's aspect; the folder's list has 32 x 48 pixels, the family's own size.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import ClassifierFreeGuidance, HunyuanVideo15ImageToVideoPipeline
from PIL import Image

from qvgen.config.leaves import load_leaf
from qvgen.config.prompts.image_prompt import ImagePrompt
from qvgen.deploy.fixed_inputs import fixed_inputs
from qvgen.errors import UserError
from qvgen.models.base import VideoDiT, example_condition
from qvgen.training.planning.operation_counter import OperationCounter
from qvgen.training.planning.shape_operators import ShapeOperators
from tests.models.family_checks import check_flow_objective, check_packed_equals_fake_quantized, tiny_family
from tests.models.further_folders import make_hunyuan15_folder
from tests.models.hub_folders import CAPTIONS
from tests.models.image_folders import clip_of, write_image

NAME = "hunyuanvideo1.5-i2v"
LETTERS = 'a boat "red"'


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory):
    """Family, its transformer, diffusers' pipeline, and an image of the family's own size."""
    root = tmp_path_factory.mktemp("hub")
    family = tiny_family(NAME, make_hunyuan15_folder(root / "model", "image"), vae_dtype="float32")
    pipeline = HunyuanVideo15ImageToVideoPipeline.from_pretrained(root / "model", local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return family, family.load_teacher(), pipeline, write_image(root / "image.png")


def test_captions_and_first_frames_become_what_the_pipeline_makes_of_them(made) -> None:
    family, _, pipeline, image = made
    assert isinstance(family, VideoDiT)
    assert family.sample_shape == (4, 3, 2, 3)
    assert {"image_encoder", "feature_extractor", "guider"} <= family.identity().keys()
    clip = clip_of(image, frames=9)
    text, found = family.encode([LETTERS]), family.encode_first_frame(clip)
    assert {key: value.shape for key, value in {**text, **found}.items()} == {
        key: value.shape for key, value in example_condition(family, count=1, make=torch.zeros).items()
    }
    with torch.no_grad():
        for value, name in zip(pipeline.encode_prompt(LETTERS), family.condition_arguments, strict=True):
            assert torch.equal(value.float(), text[name]), name
        told = {"batch_size": 1, "dtype": torch.float32, "device": torch.device("cpu")}
        picture = Image.open(image)
        latents, mask = pipeline.prepare_cond_latents_and_mask(
            torch.zeros(1, 4, 3, 2, 3), picture, height=32, width=48, **told
        )
        tokens = pipeline.encode_image(picture, **told)
    assert torch.allclose(found["image_latents"], torch.cat([latents, mask], dim=1), atol=1e-6)
    assert found["image_latents"][:, 4].flatten().tolist() == [1.0] * 6 + [0.0] * 12
    assert torch.equal(found["image_embeds"], tokens)
    assert tokens.shape == (1, 4, 12)
    other = family.encode_first_frame(clip.flip(-1))
    assert all(not torch.equal(other[key], found[key]) for key in found)


def test_prediction_is_each_call_of_the_pipeline(made) -> None:
    """Bitwise, with the caption and without; each part of the condition is heard, and of its own sample alone."""
    family, teacher, pipeline, image = made
    calls: list[tuple[dict[str, Any], torch.Tensor]] = []
    handle = pipeline.transformer.register_forward_hook(
        lambda model, args, named, output: calls.append((named, output[0])), with_kwargs=True
    )
    pipeline.guider = ClassifierFreeGuidance(guidance_scale=4.0)
    pipeline(
        image=Image.open(image), prompt=LETTERS, num_frames=9, num_inference_steps=1,
        generator=torch.Generator().manual_seed(7), output_type="latent",
    )  # fmt: skip
    handle.remove()
    first = family.encode_first_frame(clip_of(image, frames=9))
    assert len(calls) == 2
    for named, output in calls:
        condition = {key: named[key] for key in family.condition_arguments} | first
        with torch.no_grad():
            found = family.predict(teacher, named["hidden_states"][:, :4], named["timestep"], condition)
        assert torch.equal(found, output)
    clip = clip_of(image, frames=9)
    both = {**family.encode([LETTERS, CAPTIONS[1]]), **family.encode_first_frame(torch.cat([clip, clip.flip(-1)]))}
    noisy = torch.randn(2, *family.sample_shape, generator=torch.Generator().manual_seed(0))
    timestep = torch.tensor([900.0, 100.0])
    with torch.no_grad():
        found = family.predict(teacher, noisy, timestep, both)
        alone = {key: value[1:] for key, value in both.items()}
        assert torch.allclose(family.predict(teacher, noisy[1:], timestep[1:], alone)[0], found[1], atol=1e-5)
        for key in both:
            swapped = {**both, key: both[key].flip(0)}
            assert not torch.equal(family.predict(teacher, noisy, timestep, swapped), found), key


def test_the_objective_is_what_the_scheduler_undoes(made) -> None:
    check_flow_objective(made[0], shift=5.0)


def test_videos_equal_the_pipelines(made, tmp_path: Path) -> None:
    """Bitwise, of an image of the aspect ratio; one of another is cropped to the family's size, as the pipeline crops."""
    family, teacher, pipeline, _ = made
    large = write_image(tmp_path / "large.png", height=64, width=96, shade=90)
    tall = write_image(tmp_path / "tall.png", height=90, width=60)
    prompts = [ImagePrompt(LETTERS, str(file)) for file in (large, tall)]
    videos = family.generate(teacher, prompts, [7, 7], num_steps=1, guidance_scale=4.0)
    pipeline.guider = ClassifierFreeGuidance(guidance_scale=4.0)
    cropped = pipeline.video_processor.resize(Image.open(tall), height=32, width=48, resize_mode="crop")
    for video, picture in zip(videos, (Image.open(large), cropped), strict=True):
        frames = pipeline(
            image=picture, prompt=LETTERS, negative_prompt="", num_frames=9, num_inference_steps=1,
            generator=torch.Generator().manual_seed(7), output_type="pil",
        ).frames[0]  # fmt: skip
        assert np.array_equal(video.numpy(), np.stack([np.asarray(frame) for frame in frames]))
    assert not torch.equal(videos[0], videos[1])
    with pytest.raises(UserError, match=f"model={NAME} makes .* 'a red boat' has none"):
        family.generate(teacher, CAPTIONS[:1], [7], num_steps=2, guidance_scale=4.0)
    other = tiny_family(NAME, family.path, vae_dtype="float32", height=48, width=32)
    (video,) = other.generate(teacher, prompts[:1], [7], num_steps=1, guidance_scale=1.0)
    assert video.shape == (9, 48, 32, 3)  # the image's aspect does not change it


def test_packed_video_equals_the_fake_quantized_one(made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family, teacher, _, image = made
    prompts = [ImagePrompt(caption, str(image)) for caption in CAPTIONS]
    monkeypatch.setattr("tests.models.family_checks.CAPTIONS", prompts)
    check_packed_equals_fake_quantized(family, teacher, tmp_path / "packed")


def test_what_a_plan_counts_is_what_a_call_computes(made) -> None:
    family, teacher, _, _ = made
    condition = example_condition(family, count=1, make=torch.rand)
    flops = []
    for operators in (None, ShapeOperators()):
        with torch.no_grad(), OperationCounter(operators=operators) as counter:
            family.predict(teacher, torch.rand(1, *family.sample_shape), torch.tensor([500.0]), condition)
        flops.append((counter.flops["student"], counter.attention_flops["student"]))
    assert flops[0] == flops[1]
    assert min(flops[0]) > 0


def test_the_authors_sampling_and_what_is_refused(made, tmp_path: Path) -> None:
    """README.md of the authors' code, "Optimal Inference Configurations"; fixed inputs of a comparison have an image."""
    family = load_leaf("model", NAME)
    found = family.objective.shift, family.num_inference_steps, family.guidance_scale
    assert (*found, family.sampling_frames, family.fps) == (5.0, 50, 6.0, 121, 24)
    given = fixed_inputs(made[1], timestep=500.0)
    assert given["hidden_states"][:, 4:].abs().min() > 0 < given["image_embeds"].abs().min()
    text = fixed_inputs(
        load_leaf("model", "hunyuanvideo1.5").build({**made[1].config, "task_type": "t2v"}), timestep=500.0
    )
    assert not text["hidden_states"][:, 4:].any()
    assert not text["image_embeds"].any()
    with pytest.raises(
        ValueError, match=r"the image condition is latents with a mask .*; use model=hunyuanvideo1.5-i2v$"
    ):
        tiny_family("hunyuanvideo1.5", made[0].path)
    with pytest.raises(ValueError, match="is none there and latents with a mask .*; use model=hunyuanvideo1.5$"):
        tiny_family(NAME, make_hunyuan15_folder(tmp_path / "text"))
