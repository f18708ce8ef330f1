"""Latte over a tiny folder, against the plain diffusers pipeline and direct calls."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import LattePipeline

from qvgen.config.leaves import load_leaf
from qvgen.models.base import VideoDiT, example_condition
from qvgen.models.objectives import EpsilonPrediction
from tests.models.family_checks import (
    check_guidance_leads_away_from_the_negative_prompt,
    check_one_training_step,
    check_packed_equals_fake_quantized,
    check_prediction_is_per_sample,
    draw,
    tiny_family,
)
from tests.models.hub_folders import CAPTIONS
from tests.models.ltx_folders import make_latte_folder


@pytest.fixture(scope="module")
def latte(tmp_path_factory: pytest.TempPathFactory):
    folder = make_latte_folder(tmp_path_factory.mktemp("hub") / "latte")
    family = tiny_family("latte", folder)
    pipeline = LattePipeline.from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.vae = family._module(
        "vae"
    )  # two loads of it differ in the last bit: their weights lie elsewhere in memory
    return family, family.load_teacher(), pipeline


def test_it_is_a_family_and_loads_what_was_saved(latte) -> None:
    family, teacher, pipeline = latte
    assert isinstance(family, VideoDiT)
    saved = pipeline.transformer.state_dict()
    assert all(torch.equal(value, saved[key]) for key, value in teacher.state_dict().items())
    assert family.sample_shape == (4, 9, 4, 6)
    assert family.objective == EpsilonPrediction(beta_start=0.0001, beta_end=0.02)
    made, encoded = example_condition(family, count=2, make=torch.randn), family.encode(CAPTIONS)
    assert {name: value.shape for name, value in made.items()} == {name: value.shape for name, value in encoded.items()}


def test_captions_are_encoded_as_the_pipeline_does(latte) -> None:
    """The pipeline cuts an embedding behind the caption's own tokens; here they are marked."""
    family, _, pipeline = latte
    texts = [*CAPTIONS, "", "  A Red BOAT ", " ".join(["a"] * 130)]
    found = family.encode(texts)
    for row, caption in enumerate(texts):
        with torch.no_grad():
            cut = pipeline.encode_prompt(caption, do_classifier_free_guidance=False)[0]
        own = int(found["encoder_attention_mask"][row].sum())
        assert torch.equal(found["encoder_hidden_states"][row, :own], cut[0])
        assert found["encoder_attention_mask"][row, :own].all()
    assert torch.equal(found["encoder_hidden_states"][3], found["encoder_hidden_states"][0])
    assert own == 120


def test_latents_are_those_of_the_pipeline(latte) -> None:
    family, _, pipeline = latte
    pixels = torch.rand(2, 3, 9, 32, 48) * 2 - 1
    latents = family.encode_video(pixels)
    assert latents.shape == (2, *family.sample_shape)
    with torch.no_grad():
        for clip in range(2):
            for frame in (0, 8):
                raw = pipeline.vae.encode(pixels[clip, :, frame][None]).latent_dist.mode()[0]
                wanted = raw * pipeline.vae.config.scaling_factor
                assert torch.allclose(
                    latents[clip, :, frame], wanted, atol=1e-5
                )  # other frames of a batch round differently
        assert torch.equal(family.decode(latents), pipeline.decode_latents(latents, 9, 14))


def test_prediction_is_the_transformers_without_its_variance(latte) -> None:
    family, teacher, _ = latte
    noisy, timestep, condition = draw(family)
    with torch.no_grad():
        found = family.predict(teacher, noisy, timestep, condition)
        for row in range(2):
            own = int(condition["encoder_attention_mask"][row].sum())
            text = condition["encoder_hidden_states"][row : row + 1, :own]
            direct = teacher(noisy[row : row + 1], timestep[row : row + 1], text, return_dict=False)[0]
            assert direct.shape[1] == 8
            assert torch.allclose(found[row], direct[0, :4], atol=1e-5)
    check_prediction_is_per_sample(family, teacher)


def test_generation_equals_the_pipelines(latte) -> None:
    family, teacher, pipeline = latte
    videos = family.generate(teacher, CAPTIONS, [7, 8], num_steps=3, guidance_scale=4.0)
    for row, caption in enumerate(CAPTIONS):
        frames = pipeline(
            prompt=caption, negative_prompt="", height=32, width=48, video_length=9, num_inference_steps=3,
            guidance_scale=4.0, clean_caption=False, generator=torch.Generator().manual_seed(7 + row), output_type="pil",
        ).frames[0]  # fmt: skip
        assert np.array_equal(videos[row].numpy(), np.stack([np.asarray(frame) for frame in frames]))
    check_guidance_leads_away_from_the_negative_prompt(family, teacher, videos[:1])


def test_training_step_and_packed_video(latte, tmp_path: Path) -> None:
    family, teacher, _ = latte
    check_one_training_step(family, teacher)
    check_packed_equals_fake_quantized(family, teacher, tmp_path / "packed")


def test_what_it_is_not_made_for_is_refused(tmp_path: Path) -> None:
    for frames, nearest in ((17, 16), (40, 16), (5, 1)):
        with pytest.raises(
            ValueError, match=rf"num_frames={frames} does not fit latte, .* 16 frames, or one; use {nearest}$"
        ):
            load_leaf("model", "latte", num_frames=frames)
    with pytest.raises(ValueError, match=r"model.width=500 is no multiple of 16, VAE times patches; use 496"):
        load_leaf("model", "latte", width=500)
    with pytest.raises(ValueError, match=r"a clip of 9x512x512 does not fit latte, .*; use 16$"):
        load_leaf("model", "latte").check_clip(frames=9, height=512, width=512)
    folder = make_latte_folder(tmp_path / "hub")
    scheduler = folder / "scheduler" / "scheduler_config.json"
    config = json.loads(scheduler.read_text())
    scheduler.write_text(json.dumps({**config, "variance_type": "learned_range"}))
    assert "variance_type" not in tiny_family("latte", folder).scheduler().config
    scheduler.write_text(json.dumps({**config, "beta_schedule": "scaled_linear"}))
    with pytest.raises(ValueError, match="latte's scheduler has beta_schedule=scaled_linear; linear is supported"):
        _ = tiny_family("latte", folder).objective
