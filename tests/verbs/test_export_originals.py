"""`qvgen export` of LTX-Video and HunyuanVideo with the names of their own code; checked against diffusers' converters.

The converter of HunyuanVideo splits the fused layer of a single block at the published width alone: the tiny model's is split
here first, at its own.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders.single_file_utils import (
    convert_hunyuan_video_transformer_to_diffusers,
    convert_ltx_transformer_checkpoint_to_diffusers,
)
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

import qvgen
from qvgen.cli import BAD_INPUT, DONE, main
from qvgen.deploy.checkpoint import load_packed
from qvgen.deploy.exporters.nibbles import unpack_signed_nibbles
from qvgen.deploy.exporters.plain_weight import plain_weight
from qvgen.initializers.mse import MeanSquaredError
from qvgen.layers.fake_quant_linear import FakeQuantLinear
from qvgen.layers.swap import packed_layers
from tests.deploy.exporters.packed_models import save, tiny_hunyuan_video, tiny_ltx

WIDTH = 128
FILE = "diffusion_model.safetensors"
MAKE = {"ltx": tiny_ltx, "hunyuanvideo": tiny_hunyuan_video}


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Family -> packed model with 4-bit codes and inputs after a rotation; a part of a fused layer has 3-bit codes."""
    root = tmp_path_factory.mktemp("packed")
    narrow = {"ltx": "", "hunyuanvideo": "single_transformer_blocks.0.proj_mlp"}
    words = {"profile": "convrot", "bits": "w4a4"}
    return {name: save(make(), root / name, name=name, narrow=narrow[name], **words) for name, make in MAKE.items()}


def export(packed: Path, out: Path, *words: str) -> int:
    return main(["export", f"packed={packed}", f"out={out}", *words])


def diffusers_state(name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a file under diffusers' names, by diffusers' own converter; each begins with its rows."""
    if name == "ltx":
        return convert_ltx_transformer_checkpoint_to_diffusers(dict(tensors))
    fused = {key: value for key, value in tensors.items() if ".linear1." in key}
    state = convert_hunyuan_video_transformer_to_diffusers(
        {key: value for key, value in tensors.items() if key not in fused}
    )
    for key, value in fused.items():
        block, _, end = key.partition(".linear1.")
        block = block.replace("single_blocks", "single_transformer_blocks")
        for part, rows in zip(("q", "k", "v"), value.split(WIDTH), strict=False):
            state[f"{block}.attn.to_{part}.{end}"] = rows
        state[f"{block}.proj_mlp.{end}"] = value[3 * WIDTH :]
    return state


def report(out: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((out / "parity.json").read_text())
    return content


@pytest.mark.parametrize("name", MAKE)
def test_the_dequantized_model_is_read_by_the_converter(packed: dict[str, Path], tmp_path: Path, name: str) -> None:
    out = tmp_path / "out"
    assert export(packed[name], out, "target=bf16", "export.layout=original", "export.dtype=float32") == DONE
    model = MAKE[name]()
    model.load_state_dict(diffusers_state(name, load_file(out / FILE)), strict=True)
    source = load_packed(packed[name], kernel="reference")
    layers = packed_layers(source)
    for layer, packed_layer in layers.items():
        assert torch.equal(model.get_submodule(layer).weight, plain_weight(packed_layer)), layer
    rest = {key: value for key, value in source.state_dict().items() if key.rpartition(".")[0] not in layers}
    assert rest
    assert all(torch.equal(model.state_dict()[key], value) for key, value in rest.items())
    assert 0 < report(out)["model"]["relative_error"] < 0.5


@pytest.mark.parametrize("target", ["comfy", "int8"])
@pytest.mark.parametrize("name", MAKE)
def test_codes_scales_and_biases_are_those_of_the_packed_layers(
    packed: dict[str, Path], tmp_path: Path, name: str, target: str
) -> None:
    source = packed[name]
    if target == "int8":
        source = save(MAKE[name](), tmp_path / "packed", profile="convrot", bits="w4a8", name=name)
    out = tmp_path / "out"
    assert export(source, out, f"target={target}", "export.dtype=null") == DONE
    content = report(out)
    assert content["exact"] is True
    assert content["model"] == {"relative_error": 0.0, "max_abs": 0.0}
    tensors = load_file(out / FILE)
    markers = {key: tensors.pop(key) for key in list(tensors) if key.endswith(".comfy_quant")}
    codes = unpack_signed_nibbles if target == "comfy" else torch.Tensor.clone
    state = diffusers_state(name, tensors)
    layers = packed_layers(load_packed(source, kernel="reference"))
    for layer, packed_layer in layers.items():
        assert torch.equal(codes(state[f"{layer}.weight"]), packed_layer.integer_codes()), layer
        assert torch.equal(state[f"{layer}.weight_scale"].flatten(), packed_layer.weight_scale.flatten()), layer
        assert torch.equal(state[f"{layer}.bias"], packed_layer.bias), layer
    wanted = {"format": "convrot_w4a4", "convrot_groupsize": 64, "linear_dtype": "int4"}
    if target == "int8":
        wanted = {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 64}
    assert all(json.loads(bytes(marker.tolist())) == wanted for marker in markers.values())
    assert {key.removesuffix("comfy_quant") + "weight" for key in markers} <= tensors.keys()
    if name == "hunyuanvideo":
        assert "single_blocks.0.linear1.comfy_quant" in markers
        assert tensors["single_blocks.0.linear1.weight_scale"].shape[0] == 7 * WIDTH
        assert len(markers) < len(layers)
    else:
        assert len(markers) == len(layers)


def test_ltx_has_the_sizes_in_its_header(packed: dict[str, Path], tmp_path: Path) -> None:
    """ComfyUI reads sizes from shapes where the header has none, and 4-bit weights have half of their columns."""
    thirteen = save(tiny_ltx(), tmp_path / "13b", profile="convrot", bits="w4a4", name="ltx-13b")
    for source, is_causal in ((packed["ltx"], False), (thirteen, True)):
        assert export(source, tmp_path / f"out{is_causal}", "target=comfy") == DONE
        with safe_open(tmp_path / f"out{is_causal}" / FILE, framework="pt") as file:
            config = json.loads(file.metadata()["config"])["transformer"]
        assert config == {
            "in_channels": 8, "out_channels": 8, "num_attention_heads": 2, "attention_head_dim": 64, "num_layers": 1,
            "cross_attention_dim": 128, "caption_channels": 32, "causal_temporal_positioning": is_causal,
        }  # fmt: skip


def prepared(*, include: Sequence[str], exclude: Sequence[str] = ()) -> nn.Module:
    """HunyuanVideo of which some layers are quantized, not folded yet."""
    model: nn.Module = tiny_hunyuan_video()
    options = qvgen.PrepareOptions(include=include, exclude=exclude)
    qvgen.prepare(model, bits="w4a4", profile="convrot", init="rtn", options=options)
    return model


def saved(model: nn.Module, folder: Path) -> Path:
    qvgen.fold(model)
    qvgen.save_packed(model, folder, base_name="hunyuanvideo")
    return folder


def test_parts_of_one_layer_are_quantized_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    half = saved(prepared(include=["*transformer_blocks.*"], exclude=["*.proj_mlp"]), tmp_path / "half")
    assert export(half, tmp_path / "out", "target=comfy", "approximate=true") == BAD_INPUT
    (line,) = capsys.readouterr().err.splitlines()
    assert (
        "of a layer that ComfyUI (comfy-kitchen, convrot_w4a4) has as one, a part is quantized and another is not"
        in line
    )
    assert "has q, k, v, mlp as one tensor 'single_blocks.0.linear1.weight'" in line
    assert "nothing for mlp" in line
    assert export(half, tmp_path / "plain", "target=bf16", "export.layout=original") == DONE
    state = load_file(tmp_path / "plain" / FILE)
    assert state["single_blocks.0.linear1.weight"].shape == (7 * WIDTH, WIDTH)


def test_parts_of_one_layer_have_inputs_of_one_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = prepared(include=["*transformer_blocks.*"])
    layer = model.get_submodule("single_transformer_blocks.0.proj_mlp")
    assert isinstance(layer, FakeQuantLinear)
    wide = replace(layer.profile, activation=replace(layer.profile.activation, bits=8))
    layer.declare_(profile=wide, input_scale=None)
    MeanSquaredError().initialize_(layer, statistics=None)
    assert export(saved(model, tmp_path / "wide"), tmp_path / "out", "target=comfy") == BAD_INPUT
    (line,) = capsys.readouterr().err.splitlines()
    assert (
        "quantizes the input of 'single_blocks.0.linear1' once, and its parts have inputs of 4 bits after regular rotation "
        "by 64 ('single_transformer_blocks.0.attn.to_q') and inputs of 8 bits" in line
    )


def test_a_quantized_layer_whose_halves_change_places(tmp_path: Path) -> None:
    source = saved(prepared(include=["norm_out.linear"]), tmp_path / "packed")
    assert export(source, tmp_path / "out", "target=comfy", "export.dtype=null") == DONE
    tensors = load_file(tmp_path / "out" / FILE)
    name, (layer,) = "final_layer.adaLN_modulation.1", packed_layers(load_packed(source, kernel="reference")).values()
    scale, shift = layer.integer_codes().chunk(2)
    assert torch.equal(unpack_signed_nibbles(tensors[f"{name}.weight"]), torch.cat([shift, scale]))
    scale, shift = layer.weight_scale.flatten().chunk(2)
    assert torch.equal(tensors[f"{name}.weight_scale"], torch.cat([shift, scale]))
    assert json.loads(bytes(tensors[f"{name}.comfy_quant"].tolist()))["format"] == "convrot_w4a4"
