"""Image-to-video families over tiny folders, against the plain diffusers pipelines and direct calls of their parts."""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import CogVideoXImageToVideoPipeline, WanImageToVideoPipeline
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from PIL import Image
from safetensors.torch import save_file

from qvgen.config.prompts.image_prompt import ImagePrompt, facts_of, image_of
from qvgen.config.prompts.prompt import Prompts
from qvgen.models.base import VideoDiT, example_condition
from qvgen.models.original.names import WAN_ORIGINAL_NAMES
from qvgen.models.original.tensors import original_sources
from tests.models.family_checks import check_packed_equals_fake_quantized, tiny_family
from tests.models.hub_folders import CAPTIONS
from tests.models.image_folders import clip_of, make_cogvideox_image_folder, make_wan_image_folder, write_image

VARIANTS: dict[str, tuple[Any, str, Any]] = {
    "wan-i2v-14b": (make_wan_image_folder, "2.1", WanImageToVideoPipeline),
    "wan2.2-i2v-a14b": (make_wan_image_folder, "a14b", WanImageToVideoPipeline),
    "cogvideox-i2v": (make_cogvideox_image_folder, "5b", CogVideoXImageToVideoPipeline),
    "cogvideox1.5-i2v": (make_cogvideox_image_folder, "1.5", CogVideoXImageToVideoPipeline),
}


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """Name, family, its transformer, diffusers' pipeline, and an image of the family's own size."""
    make, kind, pipeline_class = VARIANTS[request.param]
    root = tmp_path_factory.mktemp("hub")
    family = tiny_family(request.param, make(root / "model", kind))
    pipeline = pipeline_class.from_pretrained(root / "model", local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    if "wan" in request.param:
        pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, flow_shift=family.shift)
    return request.param, family, family.load_teacher(), pipeline, write_image(root / "image.png")


def test_the_first_frame_becomes_what_the_pipeline_makes_of_the_image(variant) -> None:
    """Mask and latents as ``prepare_latents`` gives them for the same image; CLIP's tokens as ``encode_image``."""
    name, family, _, pipeline, image = variant
    assert isinstance(family, VideoDiT)
    assert family.sample_shape == (4, 4 if name == "cogvideox1.5-i2v" else 3, 4, 6)
    clip = clip_of(image, frames=9)
    with torch.no_grad():
        found = family.encode_first_frame(clip)
    shapes = example_condition(family, count=1, make=torch.zeros)
    assert {key: value.shape for key, value in found.items()} == {
        key: value.shape for key, value in shapes.items() if key != "encoder_hidden_states"
    }
    pixels = clip[:, :, 0]
    with torch.no_grad():
        if "wan" in name:
            _, wanted = pipeline.prepare_latents(pixels, 1, 4, 32, 48, 9, torch.float32, torch.device("cpu"))
        else:
            mode = pipeline.vae.encode(pixels[:, :, None]).latent_dist.mode()
            wanted = torch.zeros(1, *family.sample_shape)
            wanted[:, :, :1] = mode / 0.7 if name == "cogvideox1.5-i2v" else mode * 0.7
    assert torch.allclose(found["image_latents"], wanted, atol=1e-6)
    if name == "wan-i2v-14b":
        with torch.no_grad():
            embedding = pipeline.encode_image(Image.open(image), torch.device("cpu"))
        assert torch.equal(found["image_embeds"], embedding)
        assert embedding.shape == (1, 5, 12)
    other = family.encode_first_frame(clip.flip(-1))
    assert all(not torch.equal(other[key], found[key]) for key in found)


def test_prediction_is_the_transformers_at_one_noise_level_per_sample(variant) -> None:
    """Latents first, then the image's; against a direct call, with the image's tokens and the ofs where there are any."""
    name, family, teacher, _, image = variant
    clip = clip_of(image, frames=9)
    condition = {**family.encode(CAPTIONS), **family.encode_first_frame(torch.cat([clip, clip.flip(-1)]))}
    generator = torch.Generator().manual_seed(0)
    noisy, timestep = torch.randn(2, *family.sample_shape, generator=generator), torch.tensor([900.0, 100.0])
    joined = torch.cat([noisy, condition["image_latents"]], dim=1)
    with torch.no_grad():
        found = family.predict(teacher, noisy, timestep, condition)
        if "wan" in name:
            text, embedding = condition["encoder_hidden_states"], condition.get("image_embeds")
            wanted = teacher(joined, timestep, text, embedding, return_dict=False)[0]
        else:
            ofs = {"ofs": torch.tensor([2.0])} if name == "cogvideox1.5-i2v" else {}
            rotary = family._rotary_embedding(teacher, noisy)
            wanted = teacher(
                joined.transpose(1, 2), condition["encoder_hidden_states"], timestep, image_rotary_emb=rotary, **ofs,
                return_dict=False,
            )[0].transpose(1, 2)  # fmt: skip
        assert torch.equal(found, wanted)
        alone = {key: value[1:] for key, value in condition.items()}
        assert torch.allclose(family.predict(teacher, noisy[1:], timestep[1:], alone)[0], found[1], atol=1e-5)
        for key in set(condition) - {"encoder_hidden_states"}:  # each part of the image is heard
            swapped = {**condition, key: condition[key].flip(0)}
            assert not torch.equal(family.predict(teacher, noisy, timestep, swapped), found)


def test_objective_is_what_the_scheduler_undoes(variant) -> None:
    """One step from noise level t to 0 with the true target gives the clean latents back, by diffusers' own scheduler."""
    name, family, _, _, _ = variant
    scheduler, objective = family.scheduler(), family.objective
    generator = torch.Generator().manual_seed(0)
    clean, noise = (torch.randn(1, *family.sample_shape, generator=generator) for _ in range(2))
    scheduler.set_timesteps(4)
    for t in scheduler.timesteps[1:].tolist():
        sigma = torch.tensor([t / 1000.0])
        assert objective.timestep(sigma).item() == pytest.approx(t, abs=1e-3)
        noisy = objective.add_noise(clean, noise, sigma=sigma)
        target = objective.target(clean, noise, sigma=sigma)
        if "wan" in name:
            index = scheduler.timesteps.tolist().index(t)
            scheduler._step_index = index
            exact = noisy - scheduler.sigmas[index] * target
            found = scheduler.convert_model_output(target, sample=noisy)
            assert torch.allclose(found, exact, atol=1e-6)
            assert abs(float(scheduler.sigmas[index]) - t / 1000) < 1e-3  # its timesteps are whole numbers
        else:
            assert torch.allclose(noisy, scheduler.add_noise(clean, noise, torch.tensor([t])), atol=1e-6)
            found = scheduler.step(target, t, noisy, return_dict=False)[1]
            assert torch.allclose(found, clean, atol=1e-5)


def test_videos_equal_the_pipelines(variant, tmp_path: Path) -> None:
    """Bitwise, of images of the model's size and of another; another image is another video."""
    name, family, teacher, pipeline, image = variant
    large = write_image(tmp_path / "large.png", height=60, width=70, shade=90)
    prompts = [ImagePrompt(CAPTIONS[0], str(image)), ImagePrompt(CAPTIONS[0], str(large))]
    videos = family.generate(teacher, prompts, [7, 7], num_steps=2, guidance_scale=4.0)
    options = {"guidance_scale_2": family.guidance_scale_low} if name == "wan2.2-i2v-a14b" else {}
    for video, file in zip(videos, (image, large), strict=True):
        frames = pipeline(
            image=Image.open(file), prompt=CAPTIONS[0], height=32, width=48, num_frames=9, num_inference_steps=2,
            guidance_scale=4.0, negative_prompt=family.negative_prompt, generator=torch.Generator().manual_seed(7),
            output_type="pil", **options,
        ).frames[0]  # fmt: skip
        assert np.array_equal(video.numpy(), np.stack([np.asarray(frame) for frame in frames]))
    assert not torch.equal(videos[0], videos[1])
    clip = torch.from_numpy(np.array(Image.open(image)))
    assert torch.equal(
        family.generate(teacher, [ImagePrompt(CAPTIONS[0], clip)], [7], num_steps=2, guidance_scale=4.0)[0], videos[0]
    )
    with pytest.raises(ValueError, match=f"model={name} makes .* 'a red boat' has none"):
        family.generate(teacher, CAPTIONS[:1], [7], num_steps=2, guidance_scale=4.0)


@pytest.mark.parametrize("variant", ["wan-i2v-14b", "cogvideox1.5-i2v"], indirect=True)
def test_packed_video_equals_the_fake_quantized_one(variant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, family, teacher, _, image = variant
    prompts = [ImagePrompt(caption, str(image)) for caption in CAPTIONS]
    monkeypatch.setattr("tests.models.family_checks.CAPTIONS", prompts)
    check_packed_equals_fake_quantized(family, teacher, tmp_path / "packed")


def test_loras_and_files_of_the_authors_name_the_image_s_layers(tmp_path: Path) -> None:
    """W + B A for a layer of the image's tokens, with ComfyUI's key; every name goes there and back."""
    folder = make_wan_image_folder(tmp_path / "model")
    plain = tiny_family("wan-i2v-14b", folder).load_teacher()
    down, up = torch.randn(2, 32), torch.randn(32, 2)
    key = "diffusion_model.blocks.1.cross_attn.v_img"
    file = tmp_path / "lora.safetensors"
    save_file({f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(2.0)}, file)
    merged = tiny_family("wan-i2v-14b", folder, lora=str(file)).load_teacher()
    changed = {name for name, value in merged.state_dict().items() if not torch.equal(value, plain.state_dict()[name])}
    assert changed == {"blocks.1.attn2.add_v_proj.weight"}
    wanted = plain.blocks[1].attn2.add_v_proj.weight + up @ down
    assert torch.allclose(merged.blocks[1].attn2.add_v_proj.weight, wanted, atol=1e-5)
    converted = convert_wan_transformer_to_diffusers(
        {name: torch.zeros(1) for name in original_sources(plain.state_dict(), WAN_ORIGINAL_NAMES)}
    )
    assert set(converted) == set(plain.state_dict())


def test_prompts_keep_their_images_and_know_them_by_their_bytes(tmp_path: Path) -> None:
    """A list that names an image comes back from its plain values; what is kept of a video depends on the image's bytes."""
    file = str(write_image(tmp_path / "boat.png"))
    prompts = Prompts.parse([{"prompt": "a boat", "image": file}], key="prompts")
    assert prompts.plain() == [{"prompt": "a boat", "image": file}]
    assert all(type(value) is str for value in prompts.plain()[0].values())
    (video,) = Prompts.parse(prompts.plain(), key="prompts").videos([3])
    assert (video.caption, image_of(video.caption)) == ("a boat", file)
    first = facts_of(video)
    assert first["image"] == hashlib.sha256(Path(file).read_bytes()).hexdigest()
    write_image(Path(file), shade=10)
    assert facts_of(video) == {**first, "image": hashlib.sha256(Path(file).read_bytes()).hexdigest()} != first
    assert "image" not in facts_of(Prompts.of(["a boat"]).videos([3])[0])


def test_a_caption_keeps_its_image() -> None:
    prompt = ImagePrompt("a boat", "boat.png")
    assert prompt == "a boat"
    again = pickle.loads(pickle.dumps(prompt))
    assert (again, image_of(again), image_of("a boat")) == ("a boat", "boat.png", None)
