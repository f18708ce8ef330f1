"""Open-Sora 1.2 over a tiny folder: against float64 code of its own, the authors' sampler written again, and direct calls.

The published names and shapes are written out here; there was no published file to read.
"""

from __future__ import annotations

import copy
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, T5EncoderModel

import qvgen
from qvgen.cli import BAD_INPUT, main
from qvgen.config.leaves import load_leaf
from qvgen.initializers.prepare import PrepareConfig
from qvgen.layers.attention_form import AttentionForm
from qvgen.layers.attention_swap import packed_attentions
from qvgen.layers.attention_trial import attending
from qvgen.layers.noise_band import NoiseBand
from qvgen.layers.quant_attention import AttentionProduct, FakeQuantAttention
from qvgen.models.base import VideoDiT, example_condition
from qvgen.models.folder.model_class import model_class
from qvgen.models.stdit3.transformer import STDiT3
from qvgen.models.stdit3.vae import VideoAutoencoderPipeline
from qvgen.quant.attention_profile import AttentionProfile
from tests.models.family_checks import (
    check_guidance_leads_away_from_the_negative_prompt,
    check_one_training_step,
    check_packed_equals_fake_quantized,
    check_prediction_is_per_sample,
    draw,
    tiny_family,
)
from tests.models.hub_folders import CAPTIONS, make_wan_folder
from tests.models.opensora_folders import OPENSORA_TRANSFORMER, WINDOW, make_opensora_folder
from tests.models.stdit3_oracle import stdit3, temporal_frames, temporal_mean
from tests.profiles import make_profile
from tests.verbs.test_hub_models import tiny_keys

SUFFIX = " aesthetic score: 6.5."
PUBLISHED = (
    "hpcai-tech/OpenSora-STDiT-v3",
    "hpcai-tech/OpenSora-VAE-v1.2",
    "PixArt-alpha/pixart_sigma_sdxlvae_T5_diffusers",
)


@pytest.fixture(scope="module")
def opensora(tmp_path_factory: pytest.TempPathFactory):
    folder = make_opensora_folder(tmp_path_factory.mktemp("hub") / "opensora")
    family = tiny_family("opensora", folder)
    return family, family.load_teacher(), folder


def rewrite(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_it_is_a_family_and_loads_what_was_published(opensora) -> None:
    family, teacher, folder = opensora
    assert isinstance(family, VideoDiT)
    saved = load_file(folder / "transformer" / "model.safetensors")
    state = teacher.state_dict()
    assert state.keys() == saved.keys()
    assert all(torch.equal(state[key], value) for key, value in saved.items())
    assert family.sample_shape == (4, 3, 4, 6)
    assert family.transformer_config == {**OPENSORA_TRANSFORMER, "in_channels": 4, "input_sq_size": 512}
    made, encoded = example_condition(family, count=2, make=torch.randn), family.encode(CAPTIONS)
    assert {name: value.shape for name, value in made.items()} == {name: value.shape for name, value in encoded.items()}
    half = family.load_teacher(dtype=torch.bfloat16)
    assert {name for name, value in half.state_dict().items() if value.dtype != torch.bfloat16} == {"rope.freqs"}
    assert family.predict(half, *draw(family)).dtype == torch.bfloat16


def test_names_and_shapes_of_the_published_transformer() -> None:
    with torch.device("meta"):
        found = {name: tuple(value.shape) for name, value in STDiT3().state_dict().items()}
    width = 1152
    wanted: dict[str, tuple[int, ...]] = {
        "rope.freqs": (36,), "x_embedder.proj.weight": (width, 4, 1, 2, 2), "x_embedder.proj.bias": (width,),
        "y_embedder.y_embedding": (300, 4096), "final_layer.scale_shift_table": (2, width),
    }  # fmt: skip
    linears = {
        "t_embedder.mlp.0": (width, 256), "t_embedder.mlp.2": (width, width), "fps_embedder.mlp.0": (width, 256),
        "fps_embedder.mlp.2": (width, width), "t_block.1": (6 * width, width), "y_embedder.y_proj.fc1": (width, 4096),
        "y_embedder.y_proj.fc2": (width, width), "final_layer.linear": (32, width),
    }  # fmt: skip
    for block in (f"{kind}_blocks.{index}" for kind in ("spatial", "temporal") for index in range(28)):
        wanted |= {f"{block}.scale_shift_table": (6, width)}
        wanted |= {f"{block}.attn.{part}_norm.weight": (72,) for part in "qk"}
        linears |= {
            f"{block}.attn.qkv": (3 * width, width), f"{block}.attn.proj": (width, width),
            f"{block}.cross_attn.q_linear": (width, width), f"{block}.cross_attn.kv_linear": (2 * width, width),
            f"{block}.cross_attn.proj": (width, width), f"{block}.mlp.fc1": (4 * width, width),
            f"{block}.mlp.fc2": (width, 4 * width),
        }  # fmt: skip
    for name, shape in linears.items():
        wanted |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    assert found == wanted


def test_names_and_shapes_of_the_published_vae() -> None:
    """Widths of the levels are 128, 256, 256 and 512, with four blocks each; the encoder halves frames behind two levels."""
    with torch.device("meta"):
        state = VideoAutoencoderPipeline().state_dict()
    found = {name: tuple(value.shape) for name, value in state.items() if "spatial_vae" not in name}
    assert all(name.startswith("spatial_vae.module.") for name in state.keys() - found.keys())
    wanted: dict[str, tuple[int, ...]] = {"scale": (1, 4, 1, 1, 1), "shift": (1, 4, 1, 1, 1)}

    def conv(name: str, inputs: int, outputs: int, kernel: int = 3, *, bias: bool = True) -> None:
        wanted[f"temporal_vae.{name}.conv.weight"] = (outputs, inputs, *[kernel] * 3)
        if bias:
            wanted[f"temporal_vae.{name}.conv.bias"] = (outputs,)

    def norm(name: str, size: int) -> None:
        wanted.update({f"temporal_vae.{name}.{part}": (size,) for part in ("weight", "bias")})

    def blocks(name: str, inputs: int, outputs: int) -> None:
        for index, before in enumerate([inputs, outputs, outputs, outputs]):
            norm(f"{name}.{index}.norm1", before)
            conv(f"{name}.{index}.conv1", before, outputs, bias=False)
            norm(f"{name}.{index}.norm2", outputs)
            conv(f"{name}.{index}.conv2", outputs, outputs, bias=False)
            if before != outputs:
                conv(f"{name}.{index}.conv3", before, outputs, 1, bias=False)

    conv("encoder.conv_in", 4, 128, bias=False)
    for level, (before, width) in enumerate([(128, 128), (128, 256), (256, 256), (256, 512)]):
        blocks(f"encoder.block_res_blocks.{level}", before, width)
    for level, (behind, width) in enumerate([(256, 128), (256, 256), (512, 256), (512, 512)]):
        blocks(f"decoder.block_res_blocks.{level}", behind, width)
    for side in ("encoder", "decoder"):
        blocks(f"{side}.res_blocks", 512, 512)
    conv("encoder.conv_blocks.1", 256, 256)
    conv("encoder.conv_blocks.2", 256, 256)
    conv("decoder.conv_blocks.1", 256, 512)
    conv("decoder.conv_blocks.2", 512, 1024)
    norm("encoder.norm1", 512)
    norm("decoder.norm1", 128)
    conv("encoder.conv2", 512, 8, 1)
    conv("quant_conv", 8, 8, 1)
    conv("post_quant_conv", 4, 4, 1)
    conv("decoder.conv1", 4, 512)
    conv("decoder.conv_out", 128, 4)
    assert found == wanted


@pytest.mark.parametrize(("frames", "height", "width"), [(3, 4, 6), (2, 3, 5), (1, 4, 4)])
def test_forward_is_the_published_architecture(opensora, frames: int, height: int, width: int) -> None:
    _, teacher, _ = opensora
    generator = torch.Generator().manual_seed(frames)
    state = {key: value.double() for key, value in teacher.state_dict().items()}
    latents = torch.randn(2, 4, frames, height, width, generator=generator)
    text = torch.randn(2, 6, 16, generator=generator)
    own, times, rates = (6, 4), (930.25, 41.5), (24.0, 120.0)
    mask = torch.tensor([[float(token < count) for token in range(6)] for count in own])
    with torch.no_grad():
        found = teacher(latents, torch.tensor(times), text, mask, torch.tensor(rates), return_dict=False)[0]
        plain = teacher(latents, torch.tensor(times), text).sample
    for row in range(2):
        caption = text[row, : own[row]].double()
        wanted = stdit3(state, latents[row].double(), timestep=times[row], fps=rates[row], text=caption, heads=2)
        assert torch.allclose(found[row].double(), wanted, atol=2e-5), row
    wanted = stdit3(state, latents[0].double(), timestep=times[0], fps=24.0, text=text[0].double(), heads=2)
    assert torch.allclose(plain[0].double(), wanted, atol=2e-5)  # without mask and rate: all tokens, 24
    assert not torch.allclose(plain[1], found[1], atol=1e-3)


def test_it_runs_in_mixed_and_in_half_precision(opensora) -> None:
    """Within a few roundings to 8 bits of float32's output, and without a warning."""
    family, teacher, _ = opensora
    noisy, timestep, condition = draw(family)
    half = copy.deepcopy(teacher).to(torch.bfloat16)
    with torch.no_grad():
        exact = family.predict(teacher, noisy, timestep, condition)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = family.predict(teacher, noisy, timestep, condition)
        for found in (mixed, family.predict(half, noisy, timestep, condition)):
            assert 0 < (found.float() - exact).norm() / exact.norm() < 0.03


def test_checkpointed_blocks_have_the_same_gradients(opensora) -> None:
    family, teacher, _ = opensora
    noisy, timestep, condition = draw(family)
    gradients = []
    for checkpointing in (False, True):
        student = model_class("STDiT3")(**family.transformer_config)
        student.load_state_dict(teacher.state_dict())
        if checkpointing:
            student.enable_gradient_checkpointing()
        family.predict(student, noisy, timestep, condition).square().mean().backward()
        gradients.append(student.spatial_blocks[0].attn.qkv.weight.grad)
    assert torch.equal(*gradients)


def test_latents_are_those_of_both_vaes(opensora) -> None:
    family, _, folder = opensora
    vae = family._module("vae")
    state = {key: value.double() for key, value in load_file(folder / "vae" / "model.safetensors").items()}
    pixels = torch.rand(1, 3, 2 * WINDOW, 16, 24, generator=torch.Generator().manual_seed(1)) * 2 - 1
    found = family.encode_video(pixels)
    shift, scale = (torch.tensor(v).view(1, 4, 1, 1, 1) for v in ((-0.10, 0.34, 0.27, 0.98), (3.85, 2.32, 2.33, 3.06)))
    image_vae = vae.spatial_vae["module"]
    with torch.no_grad():
        images = torch.stack(
            [image_vae.encode(pixels[:, :, frame]).latent_dist.mode() * 0.18215 for frame in range(2 * WINDOW)], dim=2
        ).double()
        means = [temporal_mean(state, part, groups=2) for part in images.split(WINDOW, dim=2)]
        assert [part.shape[2] for part in means] == [3, 3]
        wanted = (torch.cat(means, dim=2) - shift) / scale
        assert torch.allclose(found.double(), wanted, atol=1e-5)
        decoded = family.decode(found, num_frames=2 * WINDOW)
        windows = (found.double() * scale + shift).split(3, dim=2)
        frames = torch.cat([temporal_frames(state, part, WINDOW, groups=2) for part in windows], dim=2)
        for frame in range(0, 2 * WINDOW, 5):
            image = image_vae.decode((frames[:, :, frame] / 0.18215).float()).sample
            assert torch.allclose(decoded[:, :, frame], image, atol=1e-4)
        picture = family.encode_video(pixels[:, :, :1])
        wanted = (temporal_mean(state, images[:, :, :1], groups=2) - shift) / scale
        assert torch.allclose(picture.double(), wanted, atol=1e-5)
        assert family.decode(picture, num_frames=1).shape == (1, 3, 1, 16, 24)


def test_captions_are_t5s_and_none_is_the_checkpoints_own(opensora) -> None:
    family, teacher, folder = opensora
    found = family.encode([*CAPTIONS, "  A Red BOAT", "", " ".join(["a"] * 60)])
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    encoder = T5EncoderModel.from_pretrained(folder / "text_encoder")
    for row, caption in enumerate(CAPTIONS):
        tokens = tokenizer(caption + SUFFIX, return_tensors="pt")
        with torch.no_grad():
            own = encoder(**tokens).last_hidden_state[0]
        assert found["encoder_attention_mask"][row].sum() == len(own)
        assert torch.allclose(found["encoder_hidden_states"][row, : len(own)], own, atol=1e-5)
    assert torch.equal(found["encoder_hidden_states"][2], found["encoder_hidden_states"][0])
    assert torch.equal(found["encoder_hidden_states"][3], teacher.y_embedder.y_embedding)
    assert found["encoder_attention_mask"].sum(1)[2:].tolist()[1:] == [40, 40]
    keys = {suffix: tiny_family("opensora", folder, caption_suffix=suffix).text_revision for suffix in ("", SUFFIX)}
    assert keys[SUFFIX] == family.text_revision != keys[""]


def ratio(frames: int, height: int, width: int) -> float:
    """The authors' factor of noise levels, for their VAE."""
    return math.sqrt(height * width / (512 * 512)) * math.sqrt(1 if frames == 1 else frames // 17 * 5)


@pytest.mark.parametrize(("frames", "height", "width"), [(51, 240, 424), (102, 720, 1280), (1, 240, 424)])
def test_objective_is_the_authors(frames: int, height: int, width: int) -> None:
    """Timesteps of 1000 to 0 are transformed by the clip's size; samples are mixed in proportion; v is clean minus noise."""
    family = load_leaf("model", "opensora", num_frames=frames, sampling_frames=frames, height=height, width=width)
    objective, factor = family.objective, ratio(frames, height, width)
    generator = torch.Generator().manual_seed(0)
    clean, noise = (torch.randn(9, 4, 3, 4, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    uniform = torch.linspace(0, 1, 9, dtype=torch.float64)
    timestep = 1000 * factor * uniform / (1 + (factor - 1) * uniform)
    sigma = objective.shifted(uniform)
    assert torch.allclose(objective.timestep(sigma), timestep, atol=1e-6)
    part = (1 - timestep / 1000).view(-1, 1, 1, 1, 1)
    mixed = part * clean + (1 - part) * noise
    assert torch.allclose(objective.add_noise(clean, noise, sigma=sigma), mixed, atol=1e-6)
    velocity = clean - noise
    assert torch.equal(objective.target(clean, noise, sigma=sigma), -velocity)
    implied = objective.noise(-velocity, noisy=mixed, timestep=timestep)
    assert torch.allclose(implied, noise, atol=1e-6)
    drawn = [objective.sample_sigma(generator=torch.Generator().manual_seed(seed)) for seed in range(200)]
    plain = [torch.rand((), generator=torch.Generator().manual_seed(seed)) for seed in range(200)]
    wanted = [factor * u / (1 + (factor - 1) * u) for u in plain]
    assert torch.allclose(torch.stack(drawn), torch.stack(wanted), atol=1e-6)


def test_generation_is_the_authors_sampler(opensora) -> None:
    """Their loop over direct calls: both halves of a batch read as many tokens as the caption has."""
    family, teacher, _ = opensora
    videos = family.generate(teacher, CAPTIONS, [7, 8], num_steps=3, guidance_scale=4.0)
    factor = math.sqrt(32 * 48 / 512**2) * math.sqrt(3)
    times = [1 - step / 3 for step in range(3)]
    times = [1000 * factor * u / (1 + (factor - 1) * u) for u in times]
    for row, caption in enumerate(CAPTIONS):
        encoded = family.encode([caption])
        tokens = int(encoded["encoder_attention_mask"].sum())
        text = torch.stack([encoded["encoder_hidden_states"][0], teacher.y_embedder.y_embedding])[:, :tokens]
        z = torch.randn(1, 4, 3, 4, 6, generator=torch.Generator().manual_seed(7 + row))
        for step, time in enumerate(times):
            with torch.no_grad():
                output = teacher(z.expand(2, -1, -1, -1, -1), torch.tensor([time] * 2), text).sample
            with_caption, without = output.chunk(2, dim=1)[0].chunk(2)
            length = (time - (times[step + 1] if step < 2 else 0)) / 1000
            z = z + (without + 4.0 * (with_caption - without)) * length
        pixels = family.decode(z, num_frames=9)
        frames = ((pixels[0].permute(1, 2, 3, 0) / 2 + 0.5).clamp(0, 1) * 255).round()
        difference = (videos[row].float() - frames).abs()
        assert difference.max() <= 1  # batches of other shapes round differently
        assert (difference > 0).float().mean() < 0.01
    check_guidance_leads_away_from_the_negative_prompt(family, teacher, videos[:1])


def test_prediction_training_step_and_packed_video(opensora, tmp_path: Path) -> None:
    family, teacher, _ = opensora
    check_prediction_is_per_sample(family, teacher)
    noisy, timestep, condition = draw(family)
    with torch.no_grad():
        found = family.predict(teacher, noisy, timestep, condition)
        direct = teacher(
            noisy,
            timestep,
            condition["encoder_hidden_states"],
            condition["encoder_attention_mask"],
            torch.full((2,), 24.0),
        ).sample
        assert torch.equal(found, -direct[:, :4])
        picture = family.predict(teacher, noisy[:, :, :1], timestep, condition)
        rate = torch.full((2,), 120.0)
        still = teacher(noisy[:, :, :1], timestep, *condition.values(), rate).sample
        assert torch.equal(picture, -still[:, :4])
    check_one_training_step(family, teacher)
    check_packed_equals_fake_quantized(family, teacher, tmp_path / "packed")


def test_attention_in_8_bits(opensora, tmp_path: Path) -> None:
    """All four attentions of a pair of blocks: frames by each other, places by each other, and both by the text, masked."""
    family, teacher, _ = opensora
    profile = replace(
        make_profile("paper", weight_bits=4, activation_bits=4), attention=AttentionProfile(kind="int8", clips=True)
    )
    check_packed_equals_fake_quantized(family, teacher, tmp_path / "packed", profile=profile)
    packed = packed_attentions(qvgen.load_packed(tmp_path / "packed"))
    blocks = [f"{kind}_blocks.{index}" for kind in ("spatial", "temporal") for index in range(2)]
    assert sorted(packed) == sorted(f"{block}.{name}" for block in blocks for name in ("attn", "cross_attn"))
    assert {(one.form.heads, one.form.head_size) for one in packed.values()} == {(2, 16)}

    noisy, timestep, condition = draw(family)
    turned = {name: product_of(AttentionProfile(kind="int8"), name) for name in packed}
    one_by_one = []
    with torch.no_grad():
        exact = family.predict(teacher, noisy, timestep, condition)
        for names in (*([name] for name in turned), turned):
            with attending(teacher, {name: turned[name] for name in names}):
                found = family.predict(teacher, noisy, timestep, condition)
            one_by_one.append(float((found - exact).norm() / exact.norm()))
    assert all(0 < error < 0.05 for error in one_by_one), (
        one_by_one
    )  # each is heard, and none is another attention's result


def product_of(profile: AttentionProfile, name: str) -> AttentionProduct:
    """The product of one of the tiny model's attentions, before training."""
    form = AttentionForm.of(profile, heads=2, head_size=16)
    return FakeQuantAttention(form, noise_band=NoiseBand(num_bands=1), name=name)


def test_exports_are_the_packed_folder_and_what_the_authors_code_reads(
    opensora, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No other runtime knows its class. Full weights have the published names and form, and are read as a model again."""
    family, teacher, folder = opensora
    student = copy.deepcopy(teacher)
    profile = make_profile("paper", weight_bits=4, activation_bits=4)
    qvgen.prepare(student, PrepareConfig(profile=profile, initializer=load_leaf("init", "rtn"), include=family.include))
    qvgen.fold(student)
    qvgen.save_packed(student, tmp_path / "packed", base_name=family.name, base_revision=family.revision)
    asked = ["ptq", *tiny_keys("opensora", folder), "bits=4", "init=rtn", "export=[torchao]", "dry_run=true"]

    def export(target: str, *words: str) -> list[str]:
        out = tmp_path / target
        return ["export", f"packed={tmp_path / 'packed'}", f"target={target}", f"out={out}", *words]

    for words in (export("torchao"), export("hub"), asked):
        assert main(words) == BAD_INPUT
        (line,) = capsys.readouterr().err.splitlines()
        assert "is read by diffusers' own classes, and STDiT3 is one of qvgen's; sample by" in line
        assert "or export target=diffusers (the packed folder, for qvgen) or target=bf16" in line
    assert not (tmp_path / "torchao").exists()
    assert main(export("diffusers")) == 0
    copied = qvgen.load_packed(tmp_path / "diffusers").state_dict()
    assert all(torch.equal(value, copied[name]) for name, value in student.state_dict().items())
    loaded = STDiT3.from_pretrained(tmp_path / "diffusers").state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in student.state_dict().items())

    assert main(export("bf16", "export.dtype=float32")) == 0
    tensors = load_file(tmp_path / "bf16" / "model.safetensors")
    assert tensors.keys() == load_file(folder / "transformer" / "model.safetensors").keys()
    published = json.loads((folder / "transformer" / "config.json").read_text())
    written = json.loads((tmp_path / "bf16" / "config.json").read_text())
    assert {key: published[key] for key in written} == written
    again = tmp_path / "again"
    shutil.copytree(folder, again, ignore=shutil.ignore_patterns("transformer"))
    shutil.copytree(tmp_path / "bf16", again / "transformer", ignore=shutil.ignore_patterns("parity*"))
    dequantized = tiny_family("opensora", again).load_teacher()
    error = (dequantized.spatial_blocks[0].attn.qkv.weight - teacher.spatial_blocks[0].attn.qkv.weight).abs().max()
    assert 0 < error < 0.2 * teacher.spatial_blocks[0].attn.qkv.weight.abs().max()
    assert torch.equal(dequantized.y_embedder.y_embedding, teacher.y_embedder.y_embedding)


def test_plan_without_weights() -> None:
    family = load_leaf("model", "opensora")
    assert family.sample_shape == (4, 15, 30, 53)
    assert family.objective.shift == pytest.approx(2.4130, abs=1e-4)
    sampling = (
        family.num_inference_steps,
        family.guidance_scale,
        family.sampling_frames,
        family.fps,
        family.negative_prompt,
    )
    assert sampling == (30, 7.0, 51, 24, "")
    for call in (family.load_teacher, lambda: family.encode(["a cat"]), lambda: family.revision):
        with pytest.raises(ValueError, match=r"model=opensora needs its weights: download its parts with ") as raised:
            call()
        assert all(f"hf download {name} " in str(raised.value) for name in PUBLISHED)
        assert str(raised.value).endswith("write model=opensora model.path=FOLDER")


def test_what_it_is_not_made_for_is_refused(tmp_path: Path) -> None:
    for frames, nearest in ((49, 51), (5, 1), (40, 34), (16, 17)):
        with pytest.raises(
            ValueError, match=rf"num_frames={frames} does not fit opensora, .* 17 frames, or one; use {nearest}$"
        ):
            load_leaf("model", "opensora", num_frames=frames)
    with pytest.raises(ValueError, match=r"model.width=426 is no multiple of 8, VAE times patches; use 424"):
        load_leaf("model", "opensora", width=426)
    with pytest.raises(ValueError, match=r"a clip of 50x240x424 does not fit opensora, .*; use 51$"):
        load_leaf("model", "opensora").check_clip(frames=50, height=240, width=424)
    with pytest.raises(ValueError, match=r"model.transformer=mine: .* write model.path alone"):
        load_leaf("model", "opensora", transformer="mine")
    with pytest.raises(ValueError, match=rf"path={tmp_path} is no folder .* --local-dir {tmp_path}/transformer`, "):
        tiny_family("opensora", tmp_path)
    with pytest.raises(ValueError, match="holds a WanTransformer3DModel, model=opensora is a STDiT3; use model=wan"):
        tiny_family("opensora", make_wan_folder(tmp_path / "wan"))


def test_a_folder_that_is_not_whole_is_refused_by_name(tmp_path: Path) -> None:
    folder = make_opensora_folder(tmp_path / "hub")
    config, weights = (folder / "transformer" / name for name in ("config.json", "model.safetensors"))
    rewrite(config, auto_map={"AutoModel": "somewhere--modeling.STDiT3"})
    family = tiny_family("opensora", folder)
    assert type(family.load_teacher()) is STDiT3  # the class that is here, whatever the file says
    tensors = load_file(weights)
    save_file({name: value for name, value in tensors.items() if name != "t_block.1.bias"}, weights)
    with pytest.raises(
        ValueError, match=r"1 tensors are missing, the first is t_block.1.bias; get it with `hf download hpc"
    ):
        family.load_teacher()
    save_file({**tensors, "t_block.1.bias": torch.zeros(3)}, weights)
    with pytest.raises(ValueError, match=r"t_block.1.bias has shape \[3\], the model's is \[192\]"):
        family.load_teacher()
    (folder / "vae" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"get it with `hf download hpcai-tech/OpenSora-VAE-v1.2 --include '\*'"):
        family.encode_video(torch.zeros(1, 3, 9, 32, 48))
    rewrite(config, qk_norm=False)
    with pytest.raises(
        ValueError, match=r"config.json: an STDiT3 of qk_norm=False is not there; the published one has True"
    ):
        tiny_family("opensora", folder)


@pytest.mark.parametrize("start", ["base_model.model.", "transformer.", ""])
def test_a_lora_is_merged_before_anything_is_quantized(opensora, start: str, tmp_path: Path) -> None:
    """W + scale alpha / rank B A, under the three kinds of names that have diffusers' or the model's own layers."""
    _, teacher, folder = opensora
    name, generator = "spatial_blocks.0.attn.qkv", torch.Generator().manual_seed(0)
    weight = teacher.get_submodule(name).weight
    down, up = (torch.randn(*shape, generator=generator) for shape in ((2, weight.shape[1]), (weight.shape[0], 2)))
    key = f"{start}{name}"
    lora = {f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up, f"{key}.alpha": torch.tensor(1.0)}
    save_file(lora, tmp_path / "lora.safetensors")
    merged = tiny_family("opensora", folder, lora=str(tmp_path / "lora.safetensors"), lora_scale=0.5).load_teacher()
    assert torch.allclose(merged.get_submodule(name).weight, weight + 0.25 * up @ down, atol=1e-6)
    assert torch.equal(merged.spatial_blocks[1].attn.qkv.weight, teacher.spatial_blocks[1].attn.qkv.weight)
