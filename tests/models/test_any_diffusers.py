"""`model=diffusers` over tiny folders of classes that no family is named after, against their own plain pipelines.

Where a family of its own is there too (Wan, CogVideoX), both are asked the same: they share no code but the pipeline's.
"""

from __future__ import annotations

import inspect
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

from qvgen.cli import BAD_INPUT, main
from qvgen.config.leaves import load_leaf
from qvgen.layers.layer_group import layer_units
from qvgen.layers.swap import select_linears
from qvgen.models.base import VideoDiT, example_condition
from qvgen.models.objectives import EpsilonPrediction, FlowMatching, VPrediction
from qvgen.models.recorded.signature import PipelineSignature
from tests.models.any_folders import VARIANTS, make_any_folder
from tests.models.family_checks import (
    check_guidance_leads_away_from_the_negative_prompt,
    check_one_training_step,
    check_packed_equals_fake_quantized,
    check_prediction_is_per_sample,
    draw,
    tiny_family,
)
from tests.models.further_folders import make_hunyuan_folder
from tests.models.hub_folders import CAPTIONS, make_cogvideox_folder, make_wan_folder
from tests.models.image_folders import make_cogvideox_image_folder
from tests.models.ltx_folders import make_ltx_folder

SIZES: dict[str, dict[str, Any]] = {
    "skyreels": {},
    "sana_video": {"width": 64},
    "pixart_sigma": {"num_frames": 1, "sampling_frames": 1},
}
OBJECTIVES = {
    "skyreels": FlowMatching(shift=8.0),
    "sana_video": FlowMatching(shift=8.0),
    "pixart_sigma": EpsilonPrediction(beta_start=0.0001, beta_end=0.02),
}
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"  # diffusers' DPM-Solver
)


@pytest.fixture(scope="module", params=VARIANTS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = make_any_folder(tmp_path_factory.mktemp("hub") / "model", request.param)
    family = tiny_family("diffusers", folder, **SIZES[request.param])
    pipeline = DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.vae = family._module(
        "vae"
    )  # two loads of it differ in the last bit: their weights lie elsewhere in memory
    return request.param, family, family.load_teacher(), pipeline


def plain_options(pipeline: Any) -> dict[str, Any]:
    """What `model=diffusers` fixes in every call."""
    fixed = {"clean_caption": False, "use_resolution_binning": False, "complex_human_instruction": None}
    known = inspect.signature(type(pipeline).__call__).parameters
    return {name: value for name, value in fixed.items() if name in known}


def test_it_is_a_family_and_loads_what_was_saved(model: Any) -> None:
    variant, family, teacher, pipeline = model
    assert isinstance(family, VideoDiT)
    saved = pipeline.transformer.state_dict()
    assert all(torch.equal(value, saved[key]) for key, value in teacher.state_dict().items())
    assert family.objective == OBJECTIVES[variant]
    quantized = select_linears(teacher, include=family.include, exclude=family.exclude).quantized
    groups = {unit.group for unit in layer_units(quantized, family.layer_groups)}
    assert groups == {"self_attention", "cross_attention", *(["ffn"] if variant != "sana_video" else []), "other"}
    made, encoded = example_condition(family, count=2, make=torch.randn), family.encode(CAPTIONS)
    assert {name: value.shape for name, value in made.items()} == {name: value.shape for name, value in encoded.items()}


def test_noise_is_that_of_the_scheduler(model: Any) -> None:
    """The oracle is diffusers' own add_noise, in the samples that the transformer is given."""
    _, family, _, pipeline = model
    clean, noise = (torch.randn(20, *family.sample_shape) for _ in range(2))
    scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config)
    scheduler.set_timesteps(20)
    if hasattr(scheduler, "scale_noise"):
        wanted = scheduler.scale_noise(clean, scheduler.timesteps, noise)
    else:
        wanted = scheduler.add_noise(clean, noise, scheduler.timesteps)
    is_flow = isinstance(family.objective, FlowMatching)
    sigma = scheduler.sigmas[:20] if is_flow else scheduler.timesteps / 1000
    assert torch.allclose(family.objective.add_noise(clean, noise, sigma=sigma), wanted, atol=1e-6)
    assert (family.objective.timestep(sigma) - scheduler.timesteps).abs().max() < 1  # UniPC cuts them to whole numbers


def test_captions_and_latents_are_those_of_the_pipeline(model: Any) -> None:
    _, family, _, pipeline = model
    found = family.encode(CAPTIONS)
    options = {key: value for key, value in plain_options(pipeline).items() if key != "use_resolution_binning"}
    options.update({} if "clean_caption" in options else {"max_sequence_length": 512})
    with torch.no_grad():
        rows = [pipeline.encode_prompt(caption, do_classifier_free_guidance=False, **options) for caption in CAPTIONS]
    assert torch.equal(found["encoder_hidden_states"], torch.cat([row[0] for row in rows]))
    if "prompt_attention_mask" in found:
        assert torch.equal(found["prompt_attention_mask"], torch.cat([row[1] for row in rows]).float())

    pixels = torch.rand(2, 3, family.num_frames, family.height, family.width) * 2 - 1
    latents, config = family.encode_video(pixels), pipeline.vae.config
    assert latents.shape == (2, *family.sample_shape)
    with torch.no_grad():
        raw = pipeline.vae.encode(pixels[:, :, 0] if family.measured.is_image else pixels).latent_dist.mode()
    if family.measured.is_image:
        wanted = (raw * config.scaling_factor).unsqueeze(2)
    else:
        mean, std = (torch.tensor(values).view(1, -1, 1, 1, 1) for values in (config.latents_mean, config.latents_std))
        wanted = (raw - mean) / std
    assert torch.allclose(latents, wanted, atol=1e-6)
    again = family.decode(latents)
    assert again.shape == pixels.shape


def test_prediction_is_what_the_pipeline_hands_to_its_scheduler(model: Any) -> None:
    """The pipeline runs one step over a batch of captions; its scheduler's arguments are the oracle."""
    _, family, teacher, pipeline = model
    seen: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    class _SeenError(Exception):
        pass

    def step(model_output: Any, timestep: Any, sample: Any, **_: Any) -> Any:
        seen.append((model_output, timestep, sample))
        raise _SeenError

    scheduler = pipeline.scheduler
    pipeline.scheduler = type(scheduler).from_config(scheduler.config)
    pipeline.scheduler.step = step
    argument = {} if family.measured.is_image else {family.signature.frames_argument: family.num_frames}
    with pytest.raises(_SeenError):
        pipeline(
            prompt=CAPTIONS, height=family.height, width=family.width, num_inference_steps=2, guidance_scale=1.0,
            generator=torch.Generator().manual_seed(3), **argument, **plain_options(pipeline),
        )  # fmt: skip
    pipeline.scheduler = scheduler
    prediction, timestep, sample = (value.unsqueeze(2) if value.ndim == 4 else value for value in seen[0])
    with torch.no_grad():
        found = family.predict(teacher, sample, timestep.float().expand(2), family.encode(CAPTIONS))
    assert torch.allclose(found, prediction, atol=1e-6)
    check_prediction_is_per_sample(family, teacher)


def test_generation_equals_the_pipelines(model: Any) -> None:
    _, family, teacher, pipeline = model
    videos = family.generate(teacher, CAPTIONS, [7, 8], num_steps=3, guidance_scale=4.0)
    argument = {} if family.measured.is_image else {family.signature.frames_argument: family.num_frames}
    for row, caption in enumerate(CAPTIONS):
        frames = pipeline(
            prompt=caption, negative_prompt="", height=family.height, width=family.width, num_inference_steps=3,
            guidance_scale=4.0, generator=torch.Generator().manual_seed(7 + row), output_type="pil", **argument,
            **plain_options(pipeline),
        )[0]  # fmt: skip
        frames = frames if family.measured.is_image else frames[0]
        assert np.array_equal(videos[row].numpy(), np.stack([np.asarray(frame) for frame in frames]))
    check_guidance_leads_away_from_the_negative_prompt(family, teacher, videos[:1])


def test_training_step_and_packed_video(model: Any, tmp_path: Path) -> None:
    _, family, teacher, _ = model
    check_one_training_step(family, teacher)
    check_packed_equals_fake_quantized(family, teacher, tmp_path / "packed")


@pytest.mark.parametrize("variant", ["easyanimate", "pixart_alpha", "sana", "cogview3plus"])
def test_further_classes_are_packed(variant: str, tmp_path: Path) -> None:
    """A dynamic shift that the pipeline sets to e; transformers that are told sizes of images; a VAE without a posterior."""
    images = SIZES["pixart_sigma"]
    sizes = {"pixart_alpha": images, "cogview3plus": images, "sana": {**images, "width": 64}}.get(variant, {})
    family = tiny_family("diffusers", make_any_folder(tmp_path / "model", variant), **sizes)
    teacher = family.load_teacher()
    check_prediction_is_per_sample(family, teacher)
    check_packed_equals_fake_quantized(family, teacher, tmp_path / "packed")
    if variant == "pixart_alpha":  # a plain pipeline raises IndexError
        with pytest.raises(
            ValueError, match=r"PixArtAlphaPipeline with DPMSolverMultistepScheduler can't sample in a single step "
        ):
            family.generate(teacher, CAPTIONS[:1], [3], num_steps=1, guidance_scale=1.0)
    if variant == "easyanimate":
        assert family.objective == FlowMatching(shift=math.e)


def test_a_folder_may_name_the_class_of_an_earlier_release(tmp_path: Path) -> None:
    """PixArt's repositories say Transformer2DModel, with more arguments; diffusers loads PixArtTransformer2DModel."""
    folder = make_any_folder(tmp_path / "model", "pixart_sigma")
    present = tiny_family("diffusers", folder, **SIZES["pixart_sigma"])
    noisy, timestep, condition = draw(present)
    with torch.no_grad():
        wanted = present.predict(present.load_teacher(), noisy, timestep, condition)
    for file, entries in (
        ("model_index.json", {"transformer": ["diffusers", "Transformer2DModel"]}),
        ("transformer/config.json", {"_class_name": "Transformer2DModel", "double_self_attention": False}),
    ):
        content = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps({**content, **entries}))
    earlier = tiny_family("diffusers", folder, **SIZES["pixart_sigma"])
    assert earlier.transformer_class == "PixArtTransformer2DModel"
    with torch.no_grad():
        found = earlier.predict(earlier.load_teacher(), noisy, timestep, condition)
    assert torch.allclose(found, wanted, atol=1e-6)
    check_packed_equals_fake_quantized(earlier, earlier.load_teacher(), tmp_path / "packed")


@pytest.mark.parametrize(("name", "make"), [("wan", make_wan_folder), ("cogvideox", make_cogvideox_folder)])
def test_a_family_of_its_own_says_the_same(name: str, make: Any, tmp_path: Path) -> None:
    folder = make(tmp_path / "model")
    named, measured = tiny_family(name, folder), tiny_family("diffusers", folder)
    assert measured.sample_shape == named.sample_shape
    assert measured.objective == named.objective
    teacher, pixels = named.load_teacher(), torch.rand(1, 3, 9, 32, 48) * 2 - 1
    assert torch.allclose(measured.encode_video(pixels), named.encode_video(pixels), atol=1e-5)
    noisy, timestep, condition = draw(named)
    assert torch.equal(measured.encode(CAPTIONS)["encoder_hidden_states"], condition["encoder_hidden_states"])
    with torch.no_grad():
        found = measured.predict(teacher, noisy, timestep, condition)
        assert torch.allclose(found, named.predict(teacher, noisy, timestep, condition), atol=1e-5)


def refusal(folder: Path, **changes: Any) -> str:
    """Why a folder is refused."""
    with pytest.raises(ValueError, match=r"\w") as caught:
        tiny_family("diffusers", folder, **changes)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_pipelines_of_other_kinds_are_refused_by_name(tmp_path: Path) -> None:
    assert "denoisers are transformer (WanTransformer3DModel), transformer_2" in refusal(
        make_wan_folder(tmp_path / "a", "a14b")
    )
    assert "has true_cfg_scale=" in refusal(make_hunyuan_folder(tmp_path / "h"))
    assert "whose call takes image= besides the caption" in refusal(make_cogvideox_image_folder(tmp_path / "i"))
    found = refusal(make_ltx_folder(tmp_path / "l"), height=64, width=96)
    assert "a LTXPipeline, which computes with numbers out of the weights of its VAE" in found

    found = refusal(make_any_folder(tmp_path / "f", "allegro"), num_frames=8, sampling_frames=8)
    assert "a AllegroPipeline, which makes 2 latent frames of 8; model=diffusers needs a VAE that makes n + 1" in found

    folder = make_any_folder(tmp_path / "p", "pixart_sigma")
    index = json.loads((folder / "model_index.json").read_text())
    images = SIZES["pixart_sigma"]

    def changed(**entries: Any) -> str:
        (folder / "model_index.json").write_text(json.dumps({**index, **entries}))
        return refusal(folder, **images)

    unet = {
        "_class_name": "StableDiffusionPipeline",
        "unet": ["diffusers", "UNet2DConditionModel"],
        "transformer": [None, None],
    }
    assert "denoisers are unet (UNet2DConditionModel)" in changed(**unet)
    assert "denoisers are transformer (UNet2DConditionModel)" in changed(
        transformer=["diffusers", "UNet2DConditionModel"]
    )
    assert "names FlowMatchEulerDiscreteScheduler, which is no pipeline" in changed(
        _class_name="FlowMatchEulerDiscreteScheduler"
    )
    assert "the part safety_checker (CLIPModel)" in changed(safety_checker=["transformers", "CLIPModel"])
    assert "names code" in changed(auto_map={"a": "b.C"})
    for part, named in {"text_encoder": ["transformers", "pipeline"], "vae": ["diffusers", "DDIMScheduler"]}.items():
        assert f"{part} is {named[1]}, which is no model of {named[0]}" in changed(**{part: named})
    (folder / "model_index.json").write_text(json.dumps(index))
    assert "model.num_frames=9, and a PixArtSigmaPipeline makes images; write 1" in refusal(folder)
    assert "can't be followed: ValueError: `height` and `width` have to be divisible by 8" in refusal(
        folder, height=33, **images
    )


@pytest.mark.parametrize(
    ("name", "parts", "why"),
    [
        (
            "Kandinsky5T2VPipeline",
            {"transformer": "Kandinsky5Transformer3DModel", "vae": "AutoencoderKLHunyuanVideo"},
            "captions keep their own numbers of tokens (its call takes prompt_cu_seqlens=)",
        ),
        (
            "HiDreamImagePipeline",
            {"transformer": "HiDreamImageTransformer2DModel"},
            "takes a caption as prompt_embeds_t5= and prompt_embeds_llama3=, and none of them is prompt_embeds=",
        ),
        (
            "HunyuanDiTPipeline",  # the class of a transformer need not say so in its name
            {"transformer": "HunyuanDiT2DModel", "scheduler": "DDPMScheduler"},
            "takes prompt_embeds_2= and whose encode_prompt does not return prompt_embeds_2",
        ),
        (
            "LTX2Pipeline",
            {
                "transformer": "LTX2VideoTransformer3DModel", "vae": "AutoencoderKLLTX2Video",
                "audio_vae": "AutoencoderKLLTX2Audio", "vocoder": "LTX2Vocoder", "connectors": "LTX2TextConnectors",
            },
            "denoises sound beside the video (it has audio_vae and vocoder); clips are trained on without their sound",
        ),
    ],
)  # fmt: skip
def test_the_true_reason_of_a_pipeline_that_can_not_be_run(name: str, parts: dict[str, str], why: str) -> None:
    of_diffusers = {"vae": "AutoencoderKL", "scheduler": "FlowMatchEulerDiscreteScheduler", **parts}
    index = {"_class_name": name, **{part: ["diffusers", kind] for part, kind in of_diffusers.items()}}
    index |= {"text_encoder": ["transformers", "T5EncoderModel"], "tokenizer": ["transformers", "T5Tokenizer"]}
    with pytest.raises(ValueError, match=r"\w") as caught:
        PipelineSignature.read(index, given="model.path=weights")
    message = str(caught.value)
    assert message.startswith(f"model.path=weights holds a {name}, ")
    assert why in message
    assert "\n" not in message


def test_schedulers_of_other_objectives_are_refused_by_name(tmp_path: Path) -> None:
    folder = make_any_folder(tmp_path / "model")
    file = folder / "scheduler" / "scheduler_config.json"
    config = json.loads(file.read_text())

    def changed(**entries: Any) -> Any:
        file.write_text(json.dumps({**config, **entries}))
        return folder

    assert "has the scheduler HeunDiscreteScheduler; model=diffusers knows" in refusal(
        changed(_class_name="HeunDiscreteScheduler")
    )
    plain = {"use_flow_sigmas": False, "prediction_type": "epsilon"}
    assert "beta_schedule=scaled_linear; model=diffusers supports linear" in refusal(
        changed(**plain, beta_schedule="scaled_linear")
    )
    v = {"use_flow_sigmas": False, "prediction_type": "v_prediction", "beta_schedule": "scaled_linear"}
    found = tiny_family("diffusers", changed(**v, beta_start=0.00085, beta_end=0.012)).objective
    assert found == VPrediction(zero_terminal_snr=False)
    assert "prediction_type=sample" in refusal(changed(**{**v, "prediction_type": "sample"}))
    flow = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 5.0}
    assert tiny_family("diffusers", changed(**flow)).objective == FlowMatching(shift=5.0)
    assert "use_karras_sigmas=True; False is supported" in refusal(changed(**flow, use_karras_sigmas=True))


def test_without_a_folder_there_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match=r"model=diffusers is whatever model.path holds"):
        load_leaf("model", "diffusers")
    for key in ([], [f"model.path={tmp_path}"]):
        assert main(["ptq", "model=diffusers", "bits=4", *key]) == BAD_INPUT
        (line,) = capsys.readouterr().err.splitlines()
        assert "model.path" in line
    assert "holds no model_index.json" in line
    assert "write model=diffusers model.path=" in line


def test_defaults_are_those_of_the_pipelines_call(tmp_path: Path) -> None:
    family = load_leaf("model", "diffusers", path=str(make_any_folder(tmp_path / "model")), height=32, width=48)
    """97 frames in 50 steps with guidance 6: SkyReelsV2Pipeline.__call__ of diffusers."""
    assert (family.sampling_frames, family.num_frames) == (97, 97)
    assert (family.num_inference_steps, family.guidance_scale) == (50, 6.0)
    with pytest.raises(ValueError, match=r"model.height is not given, and a PixArtSigmaPipeline has no default for it"):
        load_leaf("model", "diffusers", path=str(make_any_folder(tmp_path / "images", "pixart_sigma")))
