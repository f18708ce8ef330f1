"""A weight that is not finite is refused as it is loaded, a video that is not finite or of one colour as it is sampled."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from qvgen.config.leaves import load_leaf
from qvgen.models.small_folder import load_text_encoder
from qvgen.models.weight_file import load_weights, save_weights
from tests.models.family_checks import tiny_family
from tests.models.hub_folders import make_cogvideox_folder, make_wan_folder
from tests.models.small_folders import TEXT_SIZE, make_text_encoder


def spoil(file: Path, tensor: str, value: float) -> None:
    """Put one value into a tensor of a safetensors file."""
    tensors = load_file(file)
    tensors[tensor].view(-1)[-1] = value
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.fixture(scope="module")
def wan_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_wan_folder(tmp_path_factory.mktemp("hub"))


@pytest.mark.parametrize("name", ["wan", "cogvideox"])
def test_transformer_vae_and_text_encoder_name_tensor_and_file(name: str, tmp_path: Path) -> None:
    folder = {"wan": make_wan_folder, "cogvideox": make_cogvideox_folder}[name](tmp_path / "hub")
    family = tiny_family(name, folder)
    first_block = {"wan": "blocks.0.attn1.to_q.bias", "cogvideox": "transformer_blocks.0.attn1.to_q.bias"}[name]
    cases = (
        ("transformer", first_block, family.load_teacher),
        (
            "vae",
            "decoder.conv_out.bias" if name == "wan" else "decoder.conv_out.conv.bias",
            lambda: family._module("vae"),
        ),
        ("text_encoder", "encoder.final_layer_norm.weight", lambda: family._module("text_encoder")),
    )
    for (component, tensor, load), value in zip(cases, (math.nan, math.inf, -math.inf), strict=True):
        (file,) = (folder / component).glob("*.safetensors")
        before = file.read_bytes()
        load()
        family.release()
        spoil(file, tensor, value)
        with pytest.raises(
            ValueError, match=f"holds 1 {'NaN' if value != value else 'infinity'} among .*hf download"
        ) as caught:
            load()
        assert f"{file}: {tensor!r}, float32 " in str(caught.value)
        assert len(str(caught.value).splitlines()) == 1
        file.write_bytes(before)


def test_a_weight_too_large_for_its_dtype_says_so(tmp_path: Path) -> None:
    folder = make_wan_folder(tmp_path / "hub")
    (file,) = (folder / "transformer").glob("*.safetensors")
    spoil(file, "blocks.1.ffn.net.2.bias", 1e5)
    assert tiny_family("wan", folder).load_teacher().blocks[1].ffn.net[2].bias[-1] == 1e5
    match = r"'blocks.1.ffn.net.2.bias', float16 \[32\], holds 1 infinity among 32 values; choose a dtype of more range than"
    with pytest.raises(ValueError, match=match):
        tiny_family("wan", folder, dtype="float16").load_teacher()


def test_weights_of_the_package_and_a_text_encoder_are_looked_at(tmp_path: Path) -> None:
    state = load_leaf("model", "tiny").load_teacher().state_dict()
    state["proj_out.bias"][3] = math.nan
    path = save_weights(state, tmp_path / "mine.safetensors", card={})
    with pytest.raises(
        ValueError, match=r"mine.safetensors: 'proj_out.bias', float32 \[48\], holds 1 NaN among 48 values"
    ):
        load_weights(path)
    with pytest.raises(ValueError, match="'proj_out.bias'"):
        load_leaf("model", "tiny", weights=str(path)).load_teacher()
    encoder = make_text_encoder(tmp_path / "text")
    load_text_encoder(encoder, width=TEXT_SIZE)
    spoil(encoder / "model.safetensors", "embeddings.LayerNorm.weight", math.inf)
    with pytest.raises(ValueError, match=r"text: 'embeddings.LayerNorm.weight', float32 \[16\], holds 1 infinity"):
        load_text_encoder(encoder, width=TEXT_SIZE)


def sample(family: Any, transformer: nn.Module) -> torch.Tensor:
    caption = family.prompts[0]
    return family.generate(transformer, [caption], [3], num_steps=1, guidance_scale=1.0)


def test_a_video_that_is_not_finite_is_never_made(wan_folder: Path) -> None:
    for family in (tiny_family("wan", wan_folder), load_leaf("model", "tiny")):
        teacher = family.load_teacher()
        assert len(sample(family, teacher)) == 1
        with torch.no_grad():
            teacher.proj_out.bias[0] = math.nan
        match = rf"the full-precision model's video of {family.prompts[0]!r} with seed 3: 'latents', .* holds \d+ NaNs among"
        with pytest.raises(ValueError, match=match):
            sample(family, teacher)


def test_a_vae_that_overflows_is_told_from_the_transformer(wan_folder: Path) -> None:
    family = tiny_family("wan", wan_folder)
    vae = family._module("vae")
    with torch.no_grad():
        vae.decoder.conv_out.bias.fill_(math.nan)
    with pytest.raises(
        ValueError, match=r"seed 3: 'pixels', .*; the VAE left its dtype's range; write model.vae_dtype=float32"
    ):
        sample(family, family.load_teacher())


def test_a_video_of_one_colour_is_refused(wan_folder: Path) -> None:
    family = tiny_family("wan", wan_folder)
    vae = family._module("vae")
    with torch.no_grad():
        vae.decoder.conv_out.weight.zero_()
        vae.decoder.conv_out.bias.fill_(-1)
    with pytest.raises(ValueError, match="every pixel of its 9 frames is 0; check the model's weights"):
        sample(family, family.load_teacher())
