"""HunyuanVideo over a tiny folder, against the plain diffusers pipeline, direct calls and the scheduler.

Two text encoders, a mask, a pooled embedding and guidance that is told to the transformer.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import HunyuanVideoPipeline
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE

from qvgen.config.leaves import load_leaf
from qvgen.models.base import VideoDiT, example_condition
from tests.models.family_checks import (
    check_flow_objective,
    check_guidance_leads_away_from_the_negative_prompt,
    check_one_training_step,
    check_packed_equals_fake_quantized,
    check_prediction_is_per_sample,
    draw,
    tiny_family,
)
from tests.models.further_folders import make_hunyuan_folder
from tests.models.hub_folders import CAPTIONS


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory):
    """Family, transformer and plain pipeline of one folder."""
    folder = make_hunyuan_folder(tmp_path_factory.mktemp("hub") / "hunyuan")
    family = tiny_family("hunyuanvideo", folder, vae_dtype="float32")
    pipeline = HunyuanVideoPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return family, family.load_teacher(), pipeline


def test_it_is_a_family_and_loads_what_was_saved(made) -> None:
    family, teacher, pipeline = made
    assert isinstance(family, VideoDiT)
    saved = pipeline.transformer.state_dict()
    assert all(torch.equal(value, saved[key]) for key, value in teacher.state_dict().items())
    assert family.sample_shape == (4, 3, 4, 6)
    parts = {
        "transformer",
        "vae",
        "text_encoder",
        "text_encoder_2",
        "tokenizer",
        "tokenizer_2",
        "scheduler",
        "model_index",
    }
    assert family.identity().keys() == parts
    family.check_sampling_parts()


def test_captions_are_encoded_as_the_pipeline_does(made) -> None:
    """Behind the authors' template, whose 95 tokens are cut off; the pooled embedding is CLIP's."""
    family, _, pipeline = made
    template, cut = DEFAULT_PROMPT_TEMPLATE["template"], DEFAULT_PROMPT_TEMPLATE["crop_start"]
    assert len(pipeline.tokenizer(template.partition("{}")[0]).input_ids) == cut
    found = family.encode([*CAPTIONS, ""])
    shapes = example_condition(family, count=3, make=torch.empty)
    assert {name: value.shape for name, value in found.items()} == {name: value.shape for name, value in shapes.items()}
    for row, caption in enumerate([*CAPTIONS, ""]):
        with torch.no_grad():
            plain = pipeline.encode_prompt(caption)
        for value, name in zip(
            plain, ("encoder_hidden_states", "pooled_projections", "encoder_attention_mask"), strict=True
        ):
            assert torch.equal(value[0].float(), found[name][row]), name
        used = len(pipeline.tokenizer(template.format(caption)).input_ids) - cut
        assert used == len(caption.split()) + 1
        assert found["encoder_attention_mask"][row].tolist() == [1.0] * used + [0.0] * (256 - used)
    assert not torch.equal(found["pooled_projections"][0], found["pooled_projections"][1])


def test_tokens_behind_the_template_are_counted(made) -> None:
    family, _, _ = made
    assert [family.tokens_left_out(" ".join(["boat"] * count)) for count in (3, 255, 256, 260)] == [0, 0, 1, 5]


def test_every_text_part_decides_the_text_s_revision(made, tmp_path: Path) -> None:
    family, _, _ = made
    found = {family.text_revision}
    for part, change in (
        ("text_encoder_2/config.json", {"eos_token_id": 1}),
        ("tokenizer_2/tokenizer_config.json", {"a": 1}),
    ):
        folder = make_hunyuan_folder(tmp_path / part.partition("/")[0])
        content = json.loads((folder / part).read_text())
        (folder / part).write_text(json.dumps({**content, **change}))
        found.add(tiny_family("hunyuanvideo", folder).text_revision)
    assert len(found) == 3


def test_latents_are_scaled_and_decoded_as_the_pipeline_does(made) -> None:
    family, _, pipeline = made
    pixels = torch.rand(2, 3, 9, family.height, family.width) * 2 - 1
    latents = family.encode_video(pixels)
    assert latents.shape == (2, *family.sample_shape)
    with torch.no_grad():
        raw = pipeline.vae.encode(pixels).latent_dist.mode()
        decoded = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample
    assert torch.allclose(latents, raw * pipeline.vae.config.scaling_factor, atol=1e-6)  # weights that need no gradient
    assert torch.allclose(family.decode(latents), decoded, atol=1e-5)


def test_prediction_is_the_transformers_and_is_told_the_guidance(made) -> None:
    family, teacher, _ = made
    noisy, timestep, condition = draw(family)
    seen = []
    handle = teacher.register_forward_pre_hook(lambda _, __, named: seen.append(named["guidance"]), with_kwargs=True)
    with torch.no_grad():
        found = family.predict(teacher, noisy, timestep, condition)
        handle.remove()
        direct = teacher(noisy, timestep, **condition, guidance=torch.tensor([6000.0, 6000.0]), return_dict=False)[0]
        other = teacher(noisy, timestep, **condition, guidance=torch.tensor([1000.0, 1000.0]), return_dict=False)[0]
    assert torch.equal(found, direct)
    assert not torch.allclose(found, other, atol=1e-4)
    assert seen[0].tolist() == [6000.0, 6000.0]
    check_prediction_is_per_sample(family, teacher)


def test_teacher_and_student_are_told_one_guidance(made) -> None:
    """bfloat16 has no 6000: whoever rounds it in its own precision is told another one."""
    family, teacher, _ = made
    half = tiny_family("hunyuanvideo", family.path, dtype="bfloat16")
    noisy, timestep, condition = draw(half)
    seen = []
    for model in (teacher, half.load_teacher()):
        model.register_forward_pre_hook(lambda _, __, named: seen.append(named["guidance"].float()), with_kwargs=True)
        with torch.no_grad():
            half.predict(model, noisy, timestep, condition)
    assert torch.equal(seen[0], seen[1])
    assert (
        seen[0].tolist() == (torch.tensor([6.0, 6.0], dtype=torch.bfloat16) * 1000.0).tolist()
    )  # as the pipeline rounds


def test_generation_equals_the_pipelines(made) -> None:
    family, teacher, pipeline = made
    for guidance, negative in ((1.0, None), (4.0, "two boats")):
        videos = family.generate(
            teacher, CAPTIONS, [7, 8], num_steps=3, guidance_scale=guidance, negative_prompts=[negative] * 2
        )
        for row, caption in enumerate(CAPTIONS):
            frames = pipeline(
                prompt=caption, negative_prompt=negative, height=32, width=48, num_frames=9, num_inference_steps=3,
                true_cfg_scale=guidance, guidance_scale=6.0, generator=torch.Generator().manual_seed(7 + row),
            ).frames[0]  # fmt: skip
            assert np.array_equal(videos[row].numpy(), np.stack([np.asarray(frame) for frame in frames]))
    guided = family.generate(teacher, CAPTIONS[:1], [7], num_steps=3, guidance_scale=4.0)
    check_guidance_leads_away_from_the_negative_prompt(family, teacher, guided)


def test_training_step(made) -> None:
    family, teacher, _ = made
    check_one_training_step(family, teacher)


def test_packed_video_equals_the_fake_quantized_one(made, tmp_path: Path) -> None:
    family, teacher, _ = made
    check_packed_equals_fake_quantized(family, teacher, tmp_path / "packed")


@pytest.mark.parametrize("shift", [None, 3.0])
def test_the_objective_is_what_the_scheduler_undoes(made, shift: float | None) -> None:
    family = made[0] if shift is None else tiny_family("hunyuanvideo", made[0].path, shift=shift)
    check_flow_objective(family, shift=shift or 7.0)


def test_what_it_is_not_made_for_is_refused(tmp_path: Path) -> None:
    folder = make_hunyuan_folder(tmp_path / "hub", "undistilled")
    with pytest.raises(
        ValueError, match=r"embedded_guidance=6.0 does not fit .* guidance_embeds=False; write null, and mod"
    ):
        tiny_family("hunyuanvideo", folder)
    family = tiny_family("hunyuanvideo", folder, embedded_guidance=None, guidance_scale=6.0)
    with torch.no_grad():
        assert family.predict(family.load_teacher(), *draw(family)).isfinite().all()
    for changes, message in (
        ({"embedded_guidance": None}, "embedded_guidance=None does not fit .* guidance_embeds=True; write 6.0"),
        ({"embedded_guidance": -1.0}, "model.embedded_guidance=-1.0 is no finite number of at least 0"),
        ({"shift": 0.5}, "model.shift=0.5 is no finite number of at least 1"),
        ({"height": 40}, r"model.height=40 is no multiple of 16, VAE times patches; use 32"),
        ({"sampling_frames": 128}, "model.sampling_frames=128 is not 1 more than a multiple of 4; use 129"),
    ):
        with pytest.raises(ValueError, match=message):
            tiny_family("hunyuanvideo", None, **changes)
    path = folder / "scheduler" / "scheduler_config.json"
    config = json.loads(path.read_text())
    for key, value in (("invert_sigmas", True), ("use_dynamic_shifting", True)):
        path.write_text(json.dumps({**config, key: value}))
        with pytest.raises(ValueError, match=f"hunyuanvideo's scheduler has {key}=True; False is supported"):
            _ = tiny_family("hunyuanvideo", folder, embedded_guidance=None).objective


def test_the_authors_sampling(made) -> None:
    """hyvideo/config.py of the authors' code: flow-shift, infer-steps, embedded-cfg-scale, cfg-scale, video-length."""
    family = load_leaf("model", "hunyuanvideo")
    found = family.objective.shift, family.num_inference_steps, family.embedded_guidance, family.guidance_scale
    assert (*found, family.sampling_frames, family.fps) == (7.0, 50, 6.0, 1.0, 129, 24)
    assert family.scheduler().config.shift == 7.0


def test_clip_s_tokenizer_may_be_the_files_of_its_repository(made, tmp_path: Path) -> None:
    """Without tokenizer.json: vocab.json and merges.txt, from which the same tokens come."""
    folder = make_hunyuan_folder(tmp_path / "hub")
    place = folder / "tokenizer_2"
    model = json.loads((place / "tokenizer.json").read_text())["model"]
    (place / "vocab.json").write_text(json.dumps(model["vocab"]))
    (place / "merges.txt").write_text("#version: 0.2\n")
    (place / "tokenizer.json").unlink()
    family = tiny_family("hunyuanvideo", folder)
    family.check_sampling_parts()
    found, wanted = (each.encode(CAPTIONS)["pooled_projections"] for each in (family, made[0]))
    assert torch.equal(found, wanted)
    for name in ("vocab.json", "merges.txt"):
        (place / name).unlink()
    with pytest.raises(ValueError, match=r"tokenizer_2 holds none of tokenizer.json, .*--include 'tokenizer_2/\*'"):
        tiny_family("hunyuanvideo", folder).check_sampling_parts()
