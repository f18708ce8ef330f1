"""LoRAs of HunyuanVideo with the names of its own code, whose layers are fused, and with ComfyUI's, against float64 sums.

Which key is of which layers is written down here by hand; nothing of qvgen's naming is used. What diffusers' converter makes
of the layers whose width it does not assume is a second oracle.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders.lora_conversion_utils import _convert_hunyuan_video_lora_to_diffusers
from safetensors.torch import save_file
from torch import Tensor

from tests.models.family_checks import tiny_family
from tests.models.further_folders import make_hunyuan_folder

SCALE, RANK, ALPHA = 0.7, 3, 5.0
LAYERS = {  # HunyuanVideo's own code: diffusers, in the order of the rows
    "double_blocks.0.img_attn_qkv": [f"transformer_blocks.0.attn.to_{part}" for part in "qkv"],
    "double_blocks.1.txt_attn_qkv": [f"transformer_blocks.1.attn.add_{part}_proj" for part in "qkv"],
    "double_blocks.1.img_attn_proj": ["transformer_blocks.1.attn.to_out.0"],
    "double_blocks.0.img_mlp.fc1": ["transformer_blocks.0.ff.net.0.proj"],
    "double_blocks.0.txt_mod.linear": ["transformer_blocks.0.norm1_context.linear"],
    "single_blocks.1.linear1": [
        *(f"single_transformer_blocks.1.attn.to_{part}" for part in "qkv"),
        "single_transformer_blocks.1.proj_mlp",
    ],
    "single_blocks.0.linear2": ["single_transformer_blocks.0.proj_out"],
    "txt_in.individual_token_refiner.blocks.0.self_attn_qkv": [
        f"context_embedder.token_refiner.refiner_blocks.0.attn.to_{part}" for part in "qkv"
    ],
    "time_in.mlp.0": ["time_text_embed.timestep_embedder.linear_1"],
    "final_layer.adaLN_modulation.1": ["norm_out.linear"],
}
COMFY = {
    "double_blocks.0.img_attn_qkv": "double_blocks.0.img_attn.qkv",
    "double_blocks.1.txt_attn_qkv": "double_blocks.1.txt_attn.qkv",
    "double_blocks.1.img_attn_proj": "double_blocks.1.img_attn.proj",
    "double_blocks.0.img_mlp.fc1": "double_blocks.0.img_mlp.0",
    "double_blocks.0.txt_mod.linear": "double_blocks.0.txt_mod.lin",
    "txt_in.individual_token_refiner.blocks.0.self_attn_qkv": "txt_in.individual_token_refiner.blocks.0.self_attn.qkv",
    "time_in.mlp.0": "time_in.in_layer",
}
FORMS: dict[str, Callable[[str, str], str]] = {
    "diffusion-pipe": lambda layer, half: f"diffusion_model.{layer}.lora_{'AB'[half == 'up']}.weight",
    "musubi-tuner": lambda layer, half: f"lora_unet_{layer.replace('.', '_')}.lora_{half}.weight",
    "ComfyUI": lambda layer, half: f"diffusion_model.{COMFY.get(layer, layer)}.lora_{half}.weight",
    "ComfyUI's names with _": lambda layer, half: (
        f"lora_unet_{COMFY.get(layer, layer).replace('.', '_')}.lora_{half}.weight"
    ),
    "attempted diffusers": lambda layer, half: f"transformer.{layer}.lora_{'AB'[half == 'up']}.weight",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_hunyuan_folder(tmp_path_factory.mktemp("hub") / "hunyuanvideo")


@pytest.fixture(scope="module")
def weights(folder: Path) -> dict[str, Tensor]:
    return dict(tiny_family("hunyuanvideo", folder, dtype="float32").load_teacher().state_dict())


def halves(weights: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B of each layer of the file."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    for layer, parts in LAYERS.items():
        rows = sum(len(weights[f"{part}.weight"]) for part in parts)
        inputs = weights[f"{parts[0]}.weight"].shape[1]
        down, up = (torch.randn(*shape, generator=generator) * 0.2 for shape in ((RANK, inputs), (rows, RANK)))
        found[layer] = (down, up)
    return found


def added(weights: dict[str, Tensor], layers: dict[str, tuple[Tensor, Tensor]], factor: float) -> dict[str, Tensor]:
    """What must be added to each weight of diffusers, float64."""
    found = {}
    for layer, (down, up) in layers.items():
        product, first = factor * up.double() @ down.double(), 0
        if layer.startswith("final_layer"):  # the shift comes first there, the scale here
            half = len(product) // 2
            product = torch.cat([product[half:], product[:half]])
        for part in LAYERS[layer]:
            last = first + len(weights[f"{part}.weight"])
            found[f"{part}.weight"] = product[first:last]
            first = last
        assert first == len(product)
    return found


def merged(folder: Path, state: dict[str, Tensor], path: Path, **changes: Any) -> dict[str, Tensor]:
    save_file({key: value.clone() for key, value in state.items()}, path)
    lora = {"lora": str(path), "lora_scale": SCALE} | changes
    return dict(tiny_family("hunyuanvideo", folder, dtype="float32", **lora).load_teacher().state_dict())


def check(after: dict[str, Tensor], before: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    for name, value in after.items():
        if name not in wanted:
            assert torch.equal(value, before[name]), name
            continue
        exact = before[name].double() + SCALE * wanted[name]
        assert torch.allclose(value.double(), exact, rtol=0, atol=1e-6), name  # float32 of values about 1
        assert (value - before[name]).abs().max() > 1e-2, name


@pytest.mark.parametrize("form", FORMS)
def test_each_layer_takes_its_rows_of_a_fused_one(
    form: str, folder: Path, weights: dict[str, Tensor], tmp_path: Path
) -> None:
    layers, key = halves(weights), FORMS[form]
    has_alpha = "lora_down" in key("x", "down")
    state = {key(layer, half): value for layer, both in layers.items() for half, value in zip(("down", "up"), both)}  # noqa: B905
    if has_alpha:
        state |= {key(layer, "up").replace("lora_up.weight", "alpha"): torch.tensor(ALPHA) for layer in layers}
    after = merged(folder, state, tmp_path / "lora.safetensors")
    check(after, weights, added(weights, layers, ALPHA / RANK if has_alpha else 1.0))


def test_it_is_what_the_converter_of_diffusers_gives(folder: Path, weights: dict[str, Tensor], tmp_path: Path) -> None:
    """The converter splits ``linear1`` for a width of 3 072 alone, and divides a refiner's A by three too."""
    layers = {
        layer: both for layer, both in halves(weights).items() if layer.startswith("double") and "mlp" not in layer
    }
    key = FORMS["diffusion-pipe"]
    state = {key(layer, half): value for layer, both in layers.items() for half, value in zip(("down", "up"), both)}  # noqa: B905
    converted = _convert_hunyuan_video_lora_to_diffusers(dict(state))
    theirs = merged(folder, converted, tmp_path / "converted.safetensors")
    ours = merged(folder, state, tmp_path / "lora.safetensors")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_whole_differences_are_taken_apart_too(folder: Path, weights: dict[str, Tensor], tmp_path: Path) -> None:
    parts = LAYERS["double_blocks.0.img_attn_qkv"]
    kinds = {"diff": "weight", "diff_b": "bias"}
    whole = {kind: torch.cat([weights[f"{part}.{end}"] for part in parts]) for kind, end in kinds.items()}
    difference = {kind: torch.randn_like(value) for kind, value in whole.items()}
    norm = torch.randn_like(weights["single_transformer_blocks.0.attn.norm_q.weight"])
    state = {f"diffusion_model.double_blocks.0.img_attn_qkv.{kind}": value for kind, value in difference.items()}
    state["diffusion_model.single_blocks.0.norm.query_norm.diff"] = norm
    after = merged(folder, state, tmp_path / "lora.safetensors")
    wanted = {"single_transformer_blocks.0.attn.norm_q.weight": norm.double()}
    for kind, end in kinds.items():
        own = difference[kind].double().chunk(3)
        wanted |= {f"{part}.{end}": rows for part, rows in zip(parts, own, strict=True)}
    check(after, weights, wanted)


def test_what_does_not_fit_a_fused_layer_is_refused(folder: Path, weights: dict[str, Tensor], tmp_path: Path) -> None:
    down, up = halves(weights)["double_blocks.0.img_attn_qkv"]
    fused, single = "double_blocks.0.img_attn_qkv", "transformer_blocks.0.attn.to_k"
    for state, message in (
        (
            {f"{fused}.lora_A.weight": down, f"{fused}.lora_B.weight": up[:-1]},
            "does not fit transformer_blocks.0.attn.to_q",
        ),
        (
            {f"{fused}.lora_A.weight": down, f"{fused}.lora_B.weight": up, f"{single}.alpha": torch.tensor(1.0)},
            f"{single}.alpha and {fused}.lora_A.weight are both of {single}; keep one",
        ),
        ({f"{fused}.lora_A.weight": down}, "transformer_blocks.0.attn.to_q lacks its lora_B.weight"),
        ({f"{fused}_x.lora_A.weight": down}, "matches no layer of HunyuanVideoTransformer3DModel"),
    ):
        with pytest.raises(ValueError, match="use a LoRA of this model|keep one|download it again") as raised:
            merged(folder, state, tmp_path / "lora.safetensors")
        assert message in str(raised.value)
