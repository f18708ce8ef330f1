"""CogVideoX over tiny folders of its three generations, against the plain diffusers pipeline and direct calls.

2b has sincos positions, 5b rotary ones, 1.5 tokens that span two latent frames and a Linear as patch embedding.
"""

import json
import re
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from diffusers import CogVideoXPipeline
from safetensors.torch import load_file, save_file

from qvgen.config.leaves import load_leaf
from qvgen.models.base import VideoDiT
from qvgen.models.objectives import VPrediction
from tests.models.family_checks import (
    check_generation_equals_the_pipeline,
    check_one_training_step,
    check_packed_equals_fake_quantized,
    check_prediction_is_per_sample,
    draw,
    tiny_family,
)
from tests.models.hub_folders import CAPTIONS, leave_spiece_alone, make_cogvideox_folder

VARIANTS = {"2b": "cogvideox", "5b": "cogvideox-5b", "1.5": "cogvideox1.5"}


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    folder = make_cogvideox_folder(tmp_path_factory.mktemp("hub") / request.param, request.param)
    family = tiny_family(VARIANTS[request.param], folder)
    pipeline = CogVideoXPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return request.param, family, family.load_teacher(), pipeline


def test_it_is_a_family_and_loads_what_was_saved(variant) -> None:
    name, family, teacher, pipeline = variant
    assert isinstance(family, VideoDiT)
    saved = pipeline.transformer.state_dict()
    assert all(torch.equal(value, saved[key]) for key, value in teacher.state_dict().items())
    assert not teacher.training
    assert not any(p.requires_grad for p in teacher.parameters())
    half = tiny_family(family.name, family.path, dtype="bfloat16").load_teacher()
    assert half.dtype == torch.bfloat16
    assert family.sample_shape == ((4, 4, 4, 6) if name == "1.5" else (4, 3, 4, 6))
    assert family.objective == VPrediction(snr_shift_scale=3.0 if name == "2b" else 1.0)


def test_captions_are_encoded_as_the_pipeline_does(variant) -> None:
    _, family, _, pipeline = variant
    found = family.encode([*CAPTIONS, ""])["encoder_hidden_states"]
    assert found.shape == (3, 226, 16)
    assert found.dtype == torch.float32
    for caption, row in zip([*CAPTIONS, ""], found, strict=True):
        with torch.no_grad():
            assert torch.equal(pipeline.encode_prompt(caption, do_classifier_free_guidance=False)[0][0], row)
    assert not torch.equal(found[0], found[1])
    encoder = family._module("text_encoder")
    stored = load_file(family.folder.path / "text_encoder" / "model.safetensors")
    assert torch.equal(encoder.encoder.embed_tokens.weight, stored["shared.weight"])  # two names, stored as one


def test_latents_are_those_of_the_pipeline(variant) -> None:
    name, family, _, pipeline = variant
    pixels = torch.rand(2, 3, 9, 32, 48) * 2 - 1
    latents = family.encode_video(pixels)
    assert latents.shape == (2, *family.sample_shape)
    with torch.no_grad():
        scale = pipeline.vae.config.scaling_factor
        direct = pipeline.vae.encode(pixels).latent_dist.mode() * scale
        padding = 1 if name == "1.5" else 0  # 3 latent frames become 4, the first one twice
        assert torch.equal(latents[:, :, padding:], direct)
        assert torch.equal(latents[:, :, :padding], direct[:, :, :padding])
        decoded = pipeline.decode_latents(direct.transpose(1, 2))
    found = family.decode(latents)
    assert found.shape == pixels.shape
    assert torch.equal(found, decoded)


def test_prediction_is_the_transformers(variant) -> None:
    name, family, teacher, pipeline = variant
    noisy, timestep, condition = draw(family)
    rotary = None
    if name != "2b":
        rotary = pipeline._prepare_rotary_positional_embeddings(32, 48, noisy.shape[2], noisy.device)
    with torch.no_grad():
        direct = teacher(
            noisy.transpose(1, 2),
            condition["encoder_hidden_states"],
            timestep.long(),
            image_rotary_emb=rotary,
            return_dict=False,
        )[0]
        assert torch.equal(family.predict(teacher, noisy, timestep, condition), direct.transpose(1, 2))
    check_prediction_is_per_sample(family, teacher)


def test_generation_equals_the_pipelines(variant) -> None:
    _, family, teacher, pipeline = variant
    check_generation_equals_the_pipeline(family, teacher, pipeline)


def test_training_step(variant) -> None:
    _, family, teacher, _ = variant
    check_one_training_step(family, teacher)


def test_packed_video_equals_the_fake_quantized_one(variant, tmp_path: Path) -> None:
    _, family, teacher, _ = variant
    check_packed_equals_fake_quantized(family, teacher, tmp_path / "packed")


@pytest.mark.skipif(find_spec("sentencepiece") is None, reason="needs the package sentencepiece")
def test_tokenizer_of_the_repositories_is_a_spiece_model_alone(variant, tmp_path: Path) -> None:
    _, family, _, _ = variant
    folder = shutil.copytree(family.path, tmp_path / "hub")
    leave_spiece_alone(folder)
    found = tiny_family(family.name, folder).encode(CAPTIONS)["encoder_hidden_states"]
    assert torch.equal(found, family.encode(CAPTIONS)["encoder_hidden_states"])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_cogvideox_folder(tmp_path / "hub")


def test_revision_is_of_the_content(folder: Path, tmp_path: Path) -> None:
    first = tiny_family("cogvideox", folder)
    copied = tiny_family("cogvideox", shutil.copytree(folder, tmp_path / "copy"))
    assert len(first.revision) == 64
    assert first.revision == copied.revision
    components = {first.component_revision(part) for part in ("transformer", "vae", "text_encoder")}
    assert len(components) == 3
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    last = sorted(tensors)[-1]
    tensors[last].view(-1)[0] += 1e-3
    save_file(tensors, weights, metadata={"format": "pt"})
    assert tiny_family("cogvideox", folder).revision != first.revision


def test_a_missing_folder_or_part_says_what_to_download(folder: Path, tmp_path: Path) -> None:
    whole = (
        r"hf download zai-org/CogVideoX-2b --local-dir \S+/nowhere` and write model=cogvideox model.path=\S+/nowhere"
    )
    with pytest.raises(ValueError, match=rf"nowhere is not there; .*{whole}"):
        tiny_family("cogvideox", tmp_path / "nowhere")
    remedy = "get it with `hf download zai-org/CogVideoX-2b --include '{}' --local-dir {}`"
    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    family = tiny_family("cogvideox", folder)
    with pytest.raises(ValueError, match=re.escape(f"vae holds no weights; {remedy.format('vae/*', folder)}")):
        family.encode_video(torch.zeros(1, 3, 9, 32, 48))
    text = folder / "text_encoder"
    index = {"weight_map": {"a": "model-00002-of-00002.safetensors"}}
    (text / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(
        ValueError, match="holds two sets of weights, model.safetensors and model.safetensors.index.json"
    ):
        family.encode(["a"])
    (text / "model.safetensors").unlink()
    for call in (lambda: family.encode(["a"]), lambda: family.text_revision):
        with pytest.raises(
            ValueError,
            match=re.escape(f"lacks model-00002-of-00002.safetensors; {remedy.format('text_encoder/*', folder)}"),
        ):
            call()
    shutil.rmtree(folder / "tokenizer")
    with pytest.raises(ValueError, match=re.escape(f"tokenizer is missing; {remedy.format('tokenizer/*', folder)}")):
        tiny_family("cogvideox", folder).encode(["a"])


def test_damaged_or_foreign_weights_are_refused(folder: Path) -> None:
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    content = weights.read_bytes()
    family = tiny_family("cogvideox", folder)
    weights.write_bytes(content[: len(content) // 2])
    cut = rf"diffusion_pytorch_model.safetensors is cut off: it has {len(content) // 2} of {len(content)} bytes; get it"
    with pytest.raises(ValueError, match=cut):
        family.load_teacher()
    with pytest.raises(ValueError, match=cut):
        _ = family.revision
    weights.write_bytes(b"x" * 100)
    with pytest.raises(
        ValueError, match=r"diffusion_pytorch_model.safetensors is no safetensors file \(it has no header"
    ):
        _ = family.revision
    weights.write_bytes(content)
    tensors = load_file(weights)
    del tensors["proj_out.weight"]
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"1 tensors are missing, the first is proj_out\.weight"):
        family.load_teacher()
    with pytest.raises(
        ValueError,
        match="holds a CogVideoXTransformer3DModel, model=wan is a WanTransformer3DModel; use model=cogvideox$",
    ):
        tiny_family("wan", folder)
    shutil.copytree(folder / "vae", folder / "text_encoder", dirs_exist_ok=True)
    with pytest.raises(ValueError, match="text_encoder holds a AutoencoderKLCogVideoX, needed is a T5EncoderModel"):
        family.encode(["a"])


def test_sizes_and_values_are_checked() -> None:
    for changes, message in (
        ({"height": 40}, r"model.height=40 is no multiple of 16, VAE times patches; use (32|48)"),
        ({"num_frames": 12}, r"model.num_frames=12 is not 1 more than a multiple of 4; use 13"),
        ({"dtype": "int8"}, r"model.dtype=int8 is not among float32, bfloat16, float16"),
    ):
        with pytest.raises(ValueError, match=message):
            tiny_family("cogvideox", None, **changes)
    family = load_leaf("model", "cogvideox")
    with pytest.raises(ValueError, match="a clip of 9x30x48 does not fit cogvideox: frames must be 4 n"):
        family.encode_video(torch.zeros(1, 3, 9, 30, 48))
    with pytest.raises(ValueError, match="unknown key 'heads'"):
        family.build({"heads": 3})


def test_schedulers_of_other_kinds_are_refused(folder: Path) -> None:
    path = folder / "scheduler" / "scheduler_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "prediction_type": "epsilon"}))
    with pytest.raises(ValueError, match="prediction_type=epsilon; v_prediction is supported"):
        _ = tiny_family("cogvideox", folder).objective
    path.write_text(json.dumps({**config, "_class_name": "DDPMScheduler"}))
    with pytest.raises(ValueError, match="has the scheduler DDPMScheduler; one of CogVideoXDDIMScheduler"):
        _ = tiny_family("cogvideox", folder).objective
