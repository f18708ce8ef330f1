"""Wan over tiny folders of Wan2.1 and Wan2.2-TI2V, against the plain diffusers pipeline and direct calls."""

import json
import tomllib
from pathlib import Path

import pytest
import torch
from diffusers import UniPCMultistepScheduler, WanPipeline
from safetensors.torch import load_file

from qvgen.models.base import VideoDiT
from tests.models.family_checks import (
    check_generation_equals_the_pipeline,
    check_one_training_step,
    check_packed_equals_fake_quantized,
    check_prediction_is_per_sample,
    draw,
    tiny_family,
)
from tests.models.hub_folders import CAPTIONS, make_wan_folder

VARIANTS = {"2.1": "wan", "ti2v": "wan2.2-ti2v"}


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    folder = make_wan_folder(tmp_path_factory.mktemp("hub") / request.param, request.param)
    family = tiny_family(VARIANTS[request.param], folder, **({"width": 64} if request.param == "ti2v" else {}))
    pipeline = WanPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return request.param, family, family.load_teacher(), pipeline


def test_it_is_a_family_and_loads_what_was_saved(variant) -> None:
    name, family, teacher, pipeline = variant
    assert isinstance(family, VideoDiT)
    saved = pipeline.transformer.state_dict()
    assert all(torch.equal(value, saved[key]) for key, value in teacher.state_dict().items())
    assert not teacher.training
    half = tiny_family(family.name, family.path, dtype="bfloat16", width=64).load_teacher()
    assert half.dtype == torch.bfloat16
    assert half.scale_shift_table.dtype == torch.float32  # the class keeps its modulation exact
    assert family.sample_shape == ((8, 3, 2, 4) if name == "ti2v" else (4, 3, 4, 6))
    assert family.objective.shift == (5.0 if name == "ti2v" else 3.0)


def test_captions_are_encoded_as_the_pipeline_does(variant) -> None:
    """512 tokens, zeros behind a caption's own; cleaned of double spaces as the pipeline does."""
    _, family, _, pipeline = variant
    found = family.encode([*CAPTIONS, "", "a  red\tboat"])["encoder_hidden_states"]
    assert found.shape == (4, 512, 16)
    for caption, row in zip([*CAPTIONS, ""], found[:3], strict=True):
        with torch.no_grad():
            plain = pipeline.encode_prompt(caption, do_classifier_free_guidance=False, max_sequence_length=512)[0][0]
        assert torch.equal(plain, row)
        used = len(pipeline.tokenizer(caption).input_ids)
        assert row[:used].abs().sum(-1).min() > 0
        assert not row[used:].any()
    assert torch.equal(found[3], found[0])
    encoder = family._module("text_encoder")
    stored = load_file(family.folder.path / "text_encoder" / "model.safetensors")
    assert torch.equal(encoder.encoder.embed_tokens.weight, stored["shared.weight"])  # two names, stored as one


def test_umt5_is_whole_where_its_configuration_unties_the_embeddings(tmp_path: Path) -> None:
    """Wan's repositories say tie_word_embeddings false and store shared.weight alone; transformers before 5.3 left zeros."""
    folder = make_wan_folder(tmp_path / "hub")
    assert json.loads((folder / "text_encoder" / "config.json").read_text())["tie_word_embeddings"] is False
    stored = load_file(folder / "text_encoder" / "model.safetensors")
    assert "encoder.embed_tokens.weight" not in stored
    encoder = tiny_family("wan", folder)._module("text_encoder")
    assert torch.equal(encoder.encoder.embed_tokens.weight, stored["shared.weight"])
    assert stored["shared.weight"].abs().min() > 0
    tokens = torch.tensor([[4, 5, 1]])
    with torch.no_grad():
        found = encoder(tokens).last_hidden_state
        wanted = encoder(inputs_embeds=stored["shared.weight"][tokens]).last_hidden_state
    assert torch.equal(found, wanted)
    project = tomllib.loads((Path(__file__).resolve().parents[2] / "pyproject.toml").read_text(encoding="utf-8"))
    (floor,) = (line for line in project["project"]["dependencies"] if line.startswith("transformers"))
    assert floor == "transformers>=5.3"


def test_latents_are_normalized_and_decoded_as_the_pipeline_does(variant) -> None:
    _, family, _, pipeline = variant
    pixels = torch.rand(2, 3, 9, family.height, family.width) * 2 - 1
    latents = family.encode_video(pixels)
    assert latents.shape == (2, *family.sample_shape)
    config = pipeline.vae.config
    mean, deviation = (torch.tensor(value).view(1, -1, 1, 1, 1) for value in (config.latents_mean, config.latents_std))
    with torch.no_grad():
        raw = pipeline.vae.encode(pixels).latent_dist.mode()
        assert torch.allclose(latents, (raw - mean) / deviation, atol=1e-6)
        decoded = pipeline.vae.decode(raw).sample
    assert torch.allclose(family.decode(latents), decoded, atol=1e-5)  # normalizing and back costs two roundings


def test_prediction_is_the_transformers(variant) -> None:
    _, family, teacher, _ = variant
    noisy, timestep, condition = draw(family)
    with torch.no_grad():
        found = family.predict(teacher, noisy, timestep, condition)
        direct = teacher(noisy, timestep, condition["encoder_hidden_states"], return_dict=False)[0]
        assert torch.equal(found, direct)
        # A timestep for every token, all of a sample's equal, as TI2V's pipeline calls: the same function.
        tokens = noisy[0, 0].numel() // 4
        spread = timestep[:, None].expand(-1, tokens)
        by_token = teacher(noisy, spread, condition["encoder_hidden_states"], return_dict=False)[0]
        assert torch.allclose(by_token, found, atol=1e-5)
    check_prediction_is_per_sample(family, teacher)


def test_generation_equals_the_pipelines(variant) -> None:
    name, family, teacher, pipeline = variant
    assert pipeline.config.expand_timesteps == (name == "ti2v")
    check_generation_equals_the_pipeline(family, teacher, pipeline)


def test_training_step(variant) -> None:
    _, family, teacher, _ = variant
    check_one_training_step(family, teacher)


def test_packed_video_equals_the_fake_quantized_one(variant, tmp_path: Path) -> None:
    _, family, teacher, _ = variant
    check_packed_equals_fake_quantized(family, teacher, tmp_path / "packed")


def test_training_and_sampling_share_their_shift(tmp_path: Path) -> None:
    folder = make_wan_folder(tmp_path / "hub")
    family = tiny_family("wan", folder, shift=5.0)
    assert family.objective.shift == 5.0
    pipeline = WanPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = UniPCMultistepScheduler.from_config(pipeline.scheduler.config, flow_shift=5.0)
    check_generation_equals_the_pipeline(family, family.load_teacher(), pipeline)


def test_each_expert_is_trained_on_its_own_noise_and_sampled_beside_the_other(tmp_path: Path) -> None:
    folder = make_wan_folder(tmp_path / "hub", "a14b")
    pipeline = WanPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = UniPCMultistepScheduler.from_config(pipeline.scheduler.config, flow_shift=12.0)
    teachers, revisions = {}, set()
    for expert, stored in (("high", pipeline.transformer), ("low", pipeline.transformer_2)):
        family = tiny_family("wan2.2-a14b", folder, expert=expert)
        teachers[expert] = family.load_teacher()
        assert family.objective.shift == family.scheduler().config.flow_shift == 12.0  # the folder says 3
        revisions.add(family.revision)
        saved = stored.state_dict()
        assert all(torch.equal(value, saved[key]) for key, value in teachers[expert].state_dict().items())
        generator = torch.Generator().manual_seed(0)
        draws = torch.stack([family.objective.sample_sigma(generator=generator) for _ in range(200)])
        assert draws.min() >= (0.875 - 1e-6 if expert == "high" else 0)
        assert draws.max() <= (1 if expert == "high" else 0.875 + 1e-6)
        check_generation_equals_the_pipeline(family, teachers[expert], pipeline, guidance_scale_2=3.0)
        check_one_training_step(family, teachers[expert])
    assert len(revisions) == 2
    alone = family.generate(teachers["low"], CAPTIONS[:1], [1], num_steps=3, guidance_scale=4.0)
    family.use_partner(teachers["low"])  # the wrong one, to be heard
    assert not torch.equal(alone, family.generate(teachers["low"], CAPTIONS[:1], [1], num_steps=3, guidance_scale=4.0))
    with pytest.raises(ValueError, match="model.expert=middle is not among high, low"):
        tiny_family("wan2.2-a14b", folder, expert="middle")
    with pytest.raises(
        ValueError, match="the number of experts is 1 there and 2 in .*; use model=wan or model=wan-14b$"
    ):
        tiny_family("wan2.2-a14b", make_wan_folder(tmp_path / "one"))


def test_what_it_is_not_made_for_is_refused(tmp_path: Path) -> None:
    folder = make_wan_folder(tmp_path / "hub")
    scheduler = folder / "scheduler" / "scheduler_config.json"
    config = json.loads(scheduler.read_text())
    scheduler.write_text(json.dumps({**config, "use_flow_sigmas": False}))
    with pytest.raises(ValueError, match="is no flow of 1000 timesteps: .*use_flow_sigmas=False"):
        _ = tiny_family("wan", folder).objective
    scheduler.write_text(json.dumps(config))
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "boundary_ratio": 0.875}))
    with pytest.raises(ValueError, match="the number of experts is 2 there and 1 in model=wan; use model=wan2.2-a14b"):
        tiny_family("wan", folder)
    with pytest.raises(ValueError, match="1 captions and 2 seeds"):
        tiny_family("wan", None).generate(torch.nn.Linear(1, 1), ["a"], [1, 2], num_steps=1, guidance_scale=1.0)
