"""HunyuanVideo 1.5 over a tiny folder, against the plain diffusers pipeline, direct calls and the scheduler.

Two text encoders with a mask each, zeros where image to video has an image, and a guider.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    ClassifierFreeGuidance,
    HunyuanVideo15Pipeline,
)
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import save_file

from qvgen.config.leaves import load_leaf
from qvgen.deploy.card_facts import license_of
from qvgen.models.base import VideoDiT, example_condition
from qvgen.training.planning.operation_counter import OperationCounter
from qvgen.training.planning.shape_operators import ShapeOperators
from tests.models.family_checks import (
    check_flow_objective,
    check_one_training_step,
    check_packed_equals_fake_quantized,
    check_prediction_is_per_sample,
    draw,
    tiny_family,
)
from tests.models.further_folders import CROPPED_TOKENS, make_hunyuan15_folder
from tests.models.hub_folders import CAPTIONS

NAME = "hunyuanvideo1.5"
LETTERS = 'a boat "red" and "two"'
"""A caption of which ByT5 reads what stands in quotation marks."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory):
    """Family, transformer and plain pipeline of one folder."""
    folder = make_hunyuan15_folder(tmp_path_factory.mktemp("hub") / "hunyuan")
    family = tiny_family(NAME, folder, vae_dtype="float32")
    pipeline = HunyuanVideo15Pipeline.from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return family, family.load_teacher(), pipeline


def test_it_is_a_family_and_loads_what_was_saved(made) -> None:
    family, teacher, pipeline = made
    assert isinstance(family, VideoDiT)
    saved = pipeline.transformer.state_dict()
    assert all(torch.equal(value, saved[key]) for key, value in teacher.state_dict().items())
    assert family.sample_shape == (4, 3, 2, 3)
    parts = {"transformer", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler", "guider"}
    assert family.identity().keys() == parts | {"model_index"}
    family.check_sampling_parts()


def test_captions_are_encoded_as_the_pipeline_does(made) -> None:
    """Qwen's tokens behind the authors' template, whose 108 are cut off; ByT5's of letters, zeros where there are none."""
    family, _, pipeline = made
    captions = [*CAPTIONS, "", LETTERS]
    found = family.encode(captions)
    shapes = example_condition(family, count=4, make=torch.empty)
    assert {name: value.shape for name, value in found.items()} == {name: value.shape for name, value in shapes.items()}
    assert all((shapes[name] == 1).all() for name in shapes if "mask" in name)
    for row, caption in enumerate(captions):
        with torch.no_grad():
            plain = pipeline.encode_prompt(caption)
        for value, name in zip(plain, family.condition_arguments, strict=True):
            assert torch.equal(value[0].float(), found[name][row]), name
        text = [{"role": "system", "content": pipeline.system_message}, {"role": "user", "content": caption or " "}]
        used = len(pipeline.tokenizer.apply_chat_template(text, add_generation_prompt=True).input_ids) - CROPPED_TOKENS
        assert used == len(pipeline.tokenizer(caption).input_ids) + 3  # what the template has behind a caption
        assert found["encoder_attention_mask"][row].tolist() == [1.0] * used + [0.0] * (1000 - used)
    letters = len('Text "red". Text "two". ') + 1
    assert found["encoder_attention_mask_2"].sum(dim=1).tolist() == [0, 0, 0, letters]
    assert found["encoder_hidden_states_2"][:3].abs().max() == 0 < found["encoder_hidden_states_2"][3].abs().max()


def test_tokens_behind_the_template_are_counted(made) -> None:
    family, _, _ = made
    assert [family.tokens_left_out(" ".join(["boat"] * count)) for count in (3, 1000, 1001, 1005)] == [0, 0, 1, 5]


def test_latents_are_scaled_and_decoded_as_the_pipeline_does(made) -> None:
    family, _, pipeline = made
    pixels = torch.rand(2, 3, 9, family.height, family.width) * 2 - 1
    latents = family.encode_video(pixels)
    assert latents.shape == (2, *family.sample_shape)
    with torch.no_grad():  # the VAE's attention knows one clip at once
        raw = torch.cat([pipeline.vae.encode(clip[None]).latent_dist.mode() for clip in pixels])
        unscaled = latents / pipeline.vae.config.scaling_factor
        decoded = torch.cat([pipeline.vae.decode(clip[None]).sample for clip in unscaled])
    assert torch.allclose(latents, raw * pipeline.vae.config.scaling_factor, atol=1e-6)  # weights that need no gradient
    assert torch.allclose(family.decode(latents), decoded, atol=1e-5)


def test_prediction_is_the_transformers_with_zeros_for_the_image(made) -> None:
    family, teacher, _ = made
    noisy, timestep, condition = draw(family)
    told = {"image_embeds": torch.zeros(2, 729, 12), **condition}
    with torch.no_grad():
        found = family.predict(teacher, noisy, timestep, condition)
        latents = torch.cat([noisy, torch.zeros(2, 5, 3, 2, 3)], dim=1)
        assert torch.equal(found, teacher(latents, timestep, **told, return_dict=False)[0])
        told["encoder_attention_mask_2"] = torch.ones(2, 256)  # of letters that are not there
        assert not torch.allclose(teacher(latents, timestep, **told, return_dict=False)[0], found, atol=1e-4)
    check_prediction_is_per_sample(family, teacher)


def test_teacher_and_student_are_told_one_timestep(made) -> None:
    """In bfloat16 as the pipeline rounds it, which has 996 and 1000 but not 998."""
    family, teacher, _ = made
    half = tiny_family(NAME, family.path, dtype="bfloat16")
    noisy, timestep, condition = draw(half)
    seen: list[torch.Tensor] = []

    def look(model: object, args: object, named: dict[str, torch.Tensor]) -> None:
        seen.append(named["timestep"])
        raise InterruptedError

    for model in (teacher, half.load_teacher()):
        handle = model.register_forward_pre_hook(look, with_kwargs=True)
        with pytest.raises(InterruptedError):
            half.predict(model, noisy, timestep, condition)
        handle.remove()
    assert [value.dtype for value in seen] == [torch.float32, torch.bfloat16]
    assert torch.equal(seen[0], seen[1].float())
    assert torch.equal(seen[1], timestep.to(torch.bfloat16))
    assert not torch.equal(seen[0], timestep)


def test_generation_equals_the_pipelines(made) -> None:
    """Without guidance and with it, away from a negative prompt with letters of its own."""
    family, teacher, pipeline = made
    for guidance, negative in ((1.0, None), (4.0, 'two "boats"')):
        read: list[str] = []

        def encode(texts: list[str], read: list[str] = read) -> dict[str, torch.Tensor]:
            read.extend(texts)
            return family.encode(texts)

        (video,) = family.generate(
            teacher, [LETTERS], [7], num_steps=2, guidance_scale=guidance, negative_prompts=[negative], encode=encode
        )
        assert read == [LETTERS] if negative is None else [LETTERS, negative]
        pipeline.guider = ClassifierFreeGuidance(guidance_scale=guidance)
        frames = pipeline(
            prompt=LETTERS, negative_prompt=negative, height=32, width=48, num_frames=9, num_inference_steps=2,
            generator=torch.Generator().manual_seed(7), output_type="pil",
        ).frames[0]  # fmt: skip
        assert np.array_equal(video.numpy(), np.stack([np.asarray(frame) for frame in frames]))


def test_training_step(made) -> None:
    family, teacher, _ = made
    check_one_training_step(family, teacher)


def test_packed_video_equals_the_fake_quantized_one(made, tmp_path: Path) -> None:
    family, teacher, _ = made
    check_packed_equals_fake_quantized(family, teacher, tmp_path / "packed")


@pytest.mark.parametrize("shift", [None, 9.0])
def test_the_objective_is_what_the_scheduler_undoes(made, shift: float | None) -> None:
    family = made[0] if shift is None else tiny_family(NAME, made[0].path, shift=shift)
    check_flow_objective(family, shift=shift or 5.0)


def _change(file: Path, **changes: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_what_it_is_not_made_for_is_refused(tmp_path: Path) -> None:
    folder = make_hunyuan15_folder(tmp_path / "hub", "distilled")
    with pytest.raises(
        ValueError, match=r"guidance_scale=6.0 does not fit .* distilled .*; write model.guidance_scale=1.0"
    ):
        tiny_family(NAME, folder)
    tiny_family(NAME, folder, guidance_scale=1.0).check_sampling_parts()
    for changes, message in (
        ({"shift": 0.5}, "model.shift=0.5 is no finite number of at least 1"),
        ({"height": 40}, r"model.height=40 is no multiple of 16, VAE times patches; use 32"),
        ({"sampling_frames": 120}, "model.sampling_frames=120 is not 1 more than a multiple of 4; use 121"),
    ):
        with pytest.raises(ValueError, match=message):
            tiny_family(NAME, None, **changes)
    guider = folder / "guider" / "guider_config.json"
    for key, value in (("guidance_rescale", 0.7), ("_class_name", "AdaptiveProjectedGuidance"), ("stop", 0.5)):
        kept = guider.read_text()
        _change(guider, **{key: value})
        family = tiny_family(NAME, folder, guidance_scale=1.0)
        with pytest.raises(ValueError, match=f"{NAME}'s guider has {key}={value}; .* is supported"):
            family.check_sampling_parts()
        guider.write_text(kept)
    _change(folder / "scheduler" / "scheduler_config.json", use_dynamic_shifting=True)
    with pytest.raises(ValueError, match=f"{NAME}'s scheduler has use_dynamic_shifting=True; False is supported"):
        _ = tiny_family(NAME, folder, guidance_scale=1.0).objective
    guider.unlink()
    with pytest.raises(ValueError, match=r"guider_config.json can't be read .*--include 'guider/guider_config.json'"):
        tiny_family(NAME, folder).check_sampling_parts()
    (folder / "tokenizer_2" / "tokenizer_config.json").unlink()
    with pytest.raises(ValueError, match=r"tokenizer_2 holds none of tokenizer.json, .*--include 'tokenizer_2/\*'"):
        tiny_family(NAME, folder).check_sampling_parts()
    config = folder / "transformer" / "config.json"
    for changes in ({"in_channels": 98}, {"in_channels": 9, "use_meanflow": True}):
        _change(config, **changes)
        with pytest.raises(
            ValueError, match="takes 9 channels and one timestep, .* as super-resolution does; use a text-to"
        ):
            tiny_family(NAME, folder)


def test_the_authors_sampling_and_licence() -> None:
    """README.md of the authors' code, "Optimal Inference Configurations" and the command's defaults."""
    family = load_leaf("model", NAME)
    found = family.objective.shift, family.num_inference_steps, family.guidance_scale
    assert (*found, family.sampling_frames, family.fps) == (5.0, 50, 6.0, 121, 24)
    assert load_leaf("model", NAME, shift=9.0, height=720, width=1280).scheduler().config.shift == 9.0
    assert license_of(family.repository) == ("other", "tencent-hunyuan-community")


def test_what_a_plan_counts_is_what_a_call_computes(made) -> None:
    """The model sorts tokens by masks, whose values a plan does not have: it takes all of them to be a caption's own."""
    family, teacher, _ = made
    condition = example_condition(family, count=1, make=torch.rand)
    flops = []
    for operators in (None, ShapeOperators()):
        with torch.no_grad(), OperationCounter(operators=operators) as counter:
            made_by = family.predict(teacher, torch.rand(1, *family.sample_shape), torch.tensor([500.0]), condition)
        assert made_by.shape == (1, *family.sample_shape)
        flops.append((counter.flops["student"], counter.attention_flops["student"]))
    assert flops[0] == flops[1]
    assert min(flops[0]) > 0


def test_outputs_with_a_lora_are_those_of_the_transformer_that_has_it(made, tmp_path: Path) -> None:
    family, teacher, pipeline = made
    layers = ["attn.to_q", "attn.add_v_proj", "ff.net.2", "norm1.linear", "context_embedder.proj_in"]
    pipeline.transformer.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=layers))
    generator = torch.Generator().manual_seed(0)
    for key, parameter in pipeline.transformer.named_parameters():
        if ".lora_" in key:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    state = get_peft_model_state_dict(pipeline.transformer)
    save_file({f"transformer.{key}": value.contiguous() for key, value in state.items()}, tmp_path / "lora.safetensors")
    noisy, timestep, condition = draw(family)
    with torch.no_grad():
        wanted = family.predict(pipeline.transformer.eval(), noisy, timestep, condition)
        plain = family.predict(teacher, noisy, timestep, condition)
        merged = tiny_family(NAME, family.path, lora=str(tmp_path / "lora.safetensors")).load_teacher()
        found = family.predict(merged, noisy, timestep, condition)
    pipeline.transformer.delete_adapters("default")
    assert (found - wanted).norm() <= 1e-5 * wanted.norm()
    assert (found - plain).norm() >= 1e-3 * wanted.norm()
