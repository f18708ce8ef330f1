"""LTX-Video over tiny folders of 0.9.0, 0.9.1 and 13B, against the plain diffusers pipelines and direct calls.

The decoders of 0.9.1 and 13B are told a timestep, and 0.9.1's adds noise; 13B's pipeline is the one of conditions.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.pipelines.ltx.pipeline_ltx import calculate_shift
from diffusers.pipelines.ltx.pipeline_ltx_condition import LTXConditionPipeline, linear_quadratic_schedule
from peft import LoraConfig
from safetensors.torch import save_file

from qvgen.config.leaves import load_leaf
from qvgen.models.base import VideoDiT, example_condition
from qvgen.models.linear_quadratic import LinearQuadraticFlow, linear_quadratic_level
from qvgen.models.objectives import FlowMatching
from tests.models.family_checks import (
    check_guidance_leads_away_from_the_negative_prompt,
    check_one_training_step,
    check_packed_equals_fake_quantized,
    check_prediction_is_per_sample,
    draw,
    tiny_family,
)
from tests.models.hub_folders import CAPTIONS
from tests.models.ltx_folders import make_ltx_folder

VARIANTS = {"0.9.0": "ltx", "0.9.1": "ltx", "13b": "ltx-13b"}
SIZES: dict[str, Any] = {"height": 64, "width": 96}


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    folder = make_ltx_folder(tmp_path_factory.mktemp("hub") / request.param, request.param)
    family = tiny_family(VARIANTS[request.param], folder, **SIZES)
    pipeline = getattr(diffusers, family.pipeline_class).from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return request.param, family, family.load_teacher(), pipeline


def test_it_is_a_family_and_loads_what_was_saved(variant) -> None:
    _, family, teacher, pipeline = variant
    assert isinstance(family, VideoDiT)
    saved = pipeline.transformer.state_dict()
    assert all(torch.equal(value, saved[key]) for key, value in teacher.state_dict().items())
    assert family.sample_shape == (8, 2, 2, 3)
    made, encoded = example_condition(family, count=2, make=torch.randn), family.encode(CAPTIONS)
    assert {name: value.shape for name, value in made.items()} == {name: value.shape for name, value in encoded.items()}


def test_captions_are_encoded_as_the_pipeline_does(variant) -> None:
    name, family, _, pipeline = variant
    most = 256 if name == "13b" else 128
    found = family.encode([*CAPTIONS, ""])
    for row, caption in enumerate([*CAPTIONS, ""]):
        with torch.no_grad():
            text, mask, *_ = pipeline.encode_prompt(
                caption, do_classifier_free_guidance=False, max_sequence_length=most
            )
        assert torch.equal(found["encoder_hidden_states"][row], text[0])
        assert torch.equal(found["encoder_attention_mask"][row], mask[0].float())
        assert 0 < mask.sum() < most


def test_latents_are_normalized_and_decoded_as_the_pipeline_does(variant) -> None:
    name, family, _, pipeline = variant
    pixels = torch.rand(2, 3, 9, 64, 96) * 2 - 1
    latents = family.encode_video(pixels)
    assert latents.shape == (2, *family.sample_shape)
    vae = pipeline.vae
    timestep = None if name == "0.9.0" else torch.full((2,), 0.05)
    with torch.no_grad(), torch.random.fork_rng():
        raw = vae.encode(pixels).latent_dist.mode()
        normal = pipeline._normalize_latents(raw, vae.latents_mean, vae.latents_std, vae.config.scaling_factor)
        assert torch.equal(latents, normal)
        torch.manual_seed(0)  # of the noise that 0.9.1's decoder adds
        decoded = vae.decode(pipeline._denormalize_latents(latents, vae.latents_mean, vae.latents_std), timestep).sample
    state = torch.get_rng_state()
    assert torch.equal(family.decode(latents), decoded)
    assert torch.equal(torch.get_rng_state(), state)


def test_prediction_is_the_transformers(variant) -> None:
    name, family, teacher, _ = variant
    noisy, timestep, condition = draw(family)
    tokens = diffusers.LTXPipeline._pack_latents(noisy)
    if name == "13b":
        ids = LTXConditionPipeline._scale_video_ids(LTXConditionPipeline._prepare_video_ids(2, 2, 2, 3)).float()
        ids[:, 0] /= 30
        places = {"video_coords": ids}
    else:
        places = {"num_frames": 2, "height": 2, "width": 3, "rope_interpolation_scale": (8 / 25, 32, 32)}
    with torch.no_grad():
        direct = teacher(
            tokens, condition["encoder_hidden_states"], timestep, condition["encoder_attention_mask"].bool(), **places,
            return_dict=False,
        )[0]  # fmt: skip
        found = family.predict(teacher, noisy, timestep, condition)
    wanted = diffusers.LTXPipeline._unpack_latents(direct, 2, 2, 3)
    assert torch.allclose(found, wanted, atol=1e-6) if name == "13b" else torch.equal(found, wanted)
    check_prediction_is_per_sample(family, teacher)


# diffusers' scheduler makes an array of the tensor that its pipeline tells it.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_generation_equals_the_pipelines(variant) -> None:
    """Bitwise, for each caption and seed; the decoder's noise comes from the same generator as the first latents."""
    name, family, teacher, pipeline = variant
    videos = family.generate(teacher, CAPTIONS, [7, 8], num_steps=3, guidance_scale=4.0)
    options = {"guidance_rescale": family.guidance_rescale, "max_sequence_length": family.max_text_tokens}
    if name != "0.9.0":
        options |= {"decode_timestep": 0.05, "decode_noise_scale": 0.025}
    with torch.random.fork_rng():
        for row, caption in enumerate(CAPTIONS):
            torch.manual_seed(0)
            frames = pipeline(
                prompt=caption, negative_prompt=family.negative_prompt, height=64, width=96, num_frames=9,
                frame_rate=family.fps, num_inference_steps=3, guidance_scale=4.0, output_type="pil",
                generator=torch.Generator().manual_seed(7 + row), **options,
            ).frames[0]  # fmt: skip
            assert np.array_equal(videos[row].numpy(), np.stack([np.asarray(frame) for frame in frames]))
    check_guidance_leads_away_from_the_negative_prompt(family, teacher, videos[:1])
    changed = {"guidance_rescale": 0.3, "fps": 12} | ({} if name == "0.9.0" else {"decode_timestep": 0.5})
    changed |= {} if name == "0.9.0" else {"decode_noise_scale": 0.5}
    for key, value in changed.items():
        other = tiny_family(family.name, family.path, **{**SIZES, key: value})
        found = other.generate(teacher, CAPTIONS[:1], [7], num_steps=3, guidance_scale=4.0)
        assert not torch.equal(found, videos[:1]), key


def test_training_step_and_packed_video(variant, tmp_path: Path) -> None:
    _, family, teacher, _ = variant
    check_one_training_step(family, teacher)
    check_packed_equals_fake_quantized(family, teacher, tmp_path / "packed")


def test_the_shift_is_that_of_the_sampled_video() -> None:
    """Against the pipeline's own mu and the scheduler's sigmas, before these are stretched to end at shift_terminal."""
    family = load_leaf("model", "ltx")
    mu = calculate_shift(16 * 16 * 22, 1024, 4096, 0.95, 2.05)
    assert family.objective.shift == pytest.approx(math.exp(mu), rel=1e-12)
    scheduler = type(family.scheduler()).from_config(family.scheduler().config, shift_terminal=None)
    levels = np.linspace(1.0, 1 / 40, 40)
    scheduler.set_timesteps(sigmas=levels, mu=mu)
    expected = family.objective.shifted(torch.from_numpy(levels).float())
    assert torch.allclose(scheduler.sigmas[:40], expected, rtol=0, atol=1e-6)
    assert torch.allclose(scheduler.timesteps, family.objective.timestep(expected), rtol=1e-6)
    noisy = scheduler.scale_noise(torch.ones(1, 2, 3), scheduler.timesteps[10:11], torch.zeros(1, 2, 3))
    ours = family.objective.add_noise(torch.ones(1, 2, 3), torch.zeros(1, 2, 3), sigma=scheduler.sigmas[10:11])
    assert torch.allclose(noisy, ours, rtol=0, atol=1e-6)
    assert load_leaf("model", "ltx", sampling_frames=9).objective.shift < family.objective.shift


def test_the_draws_of_13b_lie_as_its_samplers_steps_do() -> None:
    levels = linear_quadratic_level(torch.arange(40) / 40)
    assert torch.allclose(levels, linear_quadratic_schedule(40), rtol=0, atol=1e-6)
    objective, generator = load_leaf("model", "ltx-13b").objective, torch.Generator().manual_seed(0)
    assert objective == LinearQuadraticFlow()
    draws = torch.stack([objective.sample_sigma(generator=generator) for _ in range(2000)])
    assert abs(float((draws > 0.975).float().mean()) - 0.5) < 0.05  # 4.5 standard deviations
    assert objective.with_shift(3.0) == FlowMatching(shift=3.0)


def test_a_lora_of_the_pipelines_loader_is_merged_as_it_would_apply_it(tmp_path: Path) -> None:
    """Keys of diffusers, and of ComfyUI with the names of the authors' code."""
    folder = make_ltx_folder(tmp_path / "hub")
    pipeline = diffusers.LTXPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.transformer.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["attn1.to_q", "proj_in"]))
    halves = {key: value for key, value in pipeline.transformer.state_dict().items() if "lora_" in key}
    files = {"diffusers": {}, "comfyui": {}}
    for key, value in halves.items():
        name = key.replace(".default", "")
        value = torch.randn(value.shape, generator=torch.Generator().manual_seed(len(key)))
        files["diffusers"][f"transformer.{name}"] = value
        files["comfyui"][f"diffusion_model.{name}".replace("proj_in", "patchify_proj")] = value
    noisy, timestep, condition = draw(tiny_family("ltx", folder, **SIZES))
    found = {}
    for name, tensors in files.items():
        save_file(tensors, tmp_path / f"{name}.safetensors")
        family = tiny_family("ltx", folder, **SIZES, lora=str(tmp_path / f"{name}.safetensors"))
        with torch.no_grad():
            found[name] = family.predict(family.load_teacher(), noisy, timestep, condition)
    pipeline.transformer.delete_adapters("default")
    pipeline.load_lora_weights(tmp_path / "diffusers.safetensors")
    with torch.no_grad():
        wanted = family.predict(pipeline.transformer, noisy, timestep, condition)
        plain = family.predict(tiny_family("ltx", folder, **SIZES).load_teacher(), noisy, timestep, condition)
    assert torch.allclose(found["diffusers"], wanted, atol=1e-4)
    assert torch.equal(found["diffusers"], found["comfyui"])
    assert not torch.allclose(wanted, plain, atol=1e-2)


def test_what_it_is_not_made_for_is_refused(tmp_path: Path) -> None:
    for changes, message in (
        ({"height": 40}, r"model.height=40 is no multiple of 32, VAE times patches; use 32"),
        ({"num_frames": 120}, r"model.num_frames=120 is not 1 more than a multiple of 8; use 121"),
        ({"decode_timestep": 1.5}, r"model.decode_timestep=1.5 is outside \[0, 1\]"),
    ):
        with pytest.raises(ValueError, match=message):
            load_leaf("model", "ltx", **changes)
    folder = make_ltx_folder(tmp_path / "hub", "13b")
    scheduler = folder / "scheduler" / "scheduler_config.json"
    config = json.loads(scheduler.read_text())
    scheduler.write_text(json.dumps({**config, "shift": 3.0}))
    with pytest.raises(ValueError, match="use_dynamic_shifting=False and shift=3.0; its pipeline lays out the noise"):
        _ = tiny_family("ltx-13b", folder, **SIZES).objective
    scheduler.write_text(json.dumps({**config, "invert_sigmas": True}))
    with pytest.raises(ValueError, match="scheduler has invert_sigmas=True; False is supported"):
        _ = tiny_family("ltx-13b", folder, **SIZES).objective
    transformer = folder / "transformer" / "config.json"
    transformer.write_text(json.dumps({**json.loads(transformer.read_text()), "patch_size": 2}))
    with pytest.raises(ValueError, match="transformer has patch_size=2; LTXPipeline samples those with 1 alone"):
        tiny_family("ltx-13b", folder, **SIZES)
