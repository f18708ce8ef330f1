"""What is no LoRA, not one of the model, or more than a LoRA is refused: in one line, with the path and what to do."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.models.hub_folders import make_cogvideox_folder, make_wan_folder
from tests.models.lora_files import (
    FILE,
    LAYERS,
    Model,
    edit_config,
    make_model,
    save_diffusers,
    save_peft,
    tiny_family,
)


@pytest.fixture(scope="module", params=LAYERS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return make_model(request.param, tmp_path_factory.mktemp("hub") / request.param)


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return make_model("wan", tmp_path_factory.mktemp("hub") / "wan")


def refuse(match: str, path: Path, folder: Path, name: str = "wan") -> None:
    """One line with the path and what to do, whenever it is noticed: when the family is built or its weights are loaded."""
    with pytest.raises(ValueError, match=match) as caught:
        tiny_family(name, folder, lora=str(path)).load_teacher()
    message = str(caught.value)
    assert message.startswith(f"model.lora={path}: ")
    assert "\n" not in message
    assert ";" in message


@pytest.mark.parametrize("suffix", ["bin", "pt", "ckpt"])
def test_pickles_are_refused_unread(wan: Model, suffix: str, tmp_path: Path) -> None:
    file = tmp_path / f"pytorch_lora_weights.{suffix}"
    file.write_bytes(b"no pickle at all: reading it would be another error")
    for path in (file, tmp_path):
        refuse(rf"pytorch_lora_weights.{suffix} is a pickle, .*; convert it to safetensors", path, wan.folder)
    with pytest.raises(ValueError, match="is a pickle"):  # before any weights are there
        tiny_family("wan", None, lora=str(file))


def test_what_is_no_lora_is_refused(wan: Model, tmp_path: Path) -> None:
    refuse("there is no such file or folder; write the path", tmp_path / "nowhere", wan.folder)
    text = tmp_path / "lora.txt"
    text.write_text("a")
    refuse("it is no .safetensors file", text, wan.folder)
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_text("a")
    refuse("damaged.safetensors is no safetensors file", damaged, wan.folder)
    empty = tmp_path / "empty"
    empty.mkdir()
    refuse(f"holds neither {FILE} nor adapter_model.safetensors", empty, wan.folder)
    weights = wan.folder / "transformer" / "diffusion_pytorch_model.safetensors"
    refuse(r"holds no LoRA keys \(its first is blocks.0.attn1", weights, wan.folder)
    saved = save_peft(wan, tmp_path / "peft")
    file = saved.path / "adapter_model.safetensors"
    refuse(r"base_model.model.\S+ is not of transformer; write the path of its folder", file, wan.folder)
    shutil.copy(save_diffusers(wan, tmp_path / "two").path, saved.path / FILE)
    refuse("it holds both", saved.path, wan.folder)
    (saved.path / FILE).unlink()
    config = saved.path / "adapter_config.json"
    for text in ("{", "3"):
        config.write_text(text)
        refuse("its configuration is no JSON mapping", saved.path, wan.folder)
    config.unlink()
    refuse("it has no adapter_config.json", saved.path, wan.folder)


def test_a_lora_of_another_model_is_refused(model: Model, tmp_path: Path) -> None:
    other = make_wan_folder if model.name == "cogvideox" else make_cogvideox_folder
    name = {"cogvideox": "wan", "wan": "cogvideox"}[model.name]
    saved = save_diffusers(model, tmp_path / "lora", target_modules=["attn1.to_q"])
    refuse(r"\S*blocks.0.attn1.to_q.lora_A.weight matches no layer of ", saved.path, other(tmp_path / "hub"), name)
    tensors = load_file(saved.path)
    first = min(tensors)
    path = tmp_path / "changed.safetensors"
    for change, match in (
        ({first: tensors[first][:, 1:].clone()}, r"A \[3, 31\], B \[32, 3\] does not fit \S+ \[32, 32\]; use a LoRA of"),
        ({first: tensors[first][1:].clone()}, r"A \[2, 32\], B \[32, 3\] does not fit"),
        ({first: tensors[first][0, 0].clone()}, r"A \[\], B \[32, 3\] does not fit"),
        ({first: tensors[first] * torch.inf}, 
            r"merged with model.lora_scale=1.0: '\S*attn1.to_q.weight', float32 \[32, 32\], holds .*; lower the scale"),
        ({"transformer_2." + first: tensors[first].clone()}, rf"transformer_2.{first} is not of transformer; use a LoRA of"),
        ({"text_encoder.lora_A.weight": tensors[first].clone()}, "text_encoder.lora_A.weight is not of transformer"),
        ({"transformer.norm_out.lora_A.weight": tensors[first].clone()}, "norm_out.lora_A.weight matches no layer"),
        ({first.replace("lora_A.weight", "alpha"): torch.ones(())}, r"to_q.alpha matches no layer"),
        ({first.replace("lora_A.weight", "lora_magnitude_vector"): torch.ones(32)}, "vector matches no layer"),
        ({first.replace("lora_A.weight", "dora_scale"): torch.ones(32)}, r"to_q.dora_scale is no LoRA's"),
    ):  # fmt: skip
        save_file(tensors | change, path)
        refuse(match, path, model.folder, model.name)
    save_file({key: value for key, value in tensors.items() if key != first}, path)
    refuse(r"attn1.to_q lacks its lora_A.weight", path, model.folder, model.name)


def test_what_diffusers_would_drop_is_refused(wan: Model, tmp_path: Path) -> None:
    down = {f"diffusion_model.blocks.{block}.self_attn.q.lora_down.weight": torch.ones(2, 32) for block in range(2)}
    tensors = down | {key.replace("down", "up"): torch.ones(32, 2) for key in down}
    path = tmp_path / "lora.safetensors"
    save_file(tensors, path)
    tiny_family("wan", wan.folder, lora=str(path)).load_teacher()
    for key in ("blocks.0.self_attn.norm_q.diff", "time_projection.1.diff_b", "patch_embedding.diff"):
        save_file(tensors | {f"diffusion_model.{key}": torch.ones(32)}, path)
        refuse(f"diffusion_model.{key} is no LoRA's", path, wan.folder)
    save_file(tensors | {"diffusion_model.blocks.0.unknown.lora_down.weight": torch.ones(2, 32)}, path)
    refuse("diffusers can't convert it .*unknown.*; use a LoRA of this model", path, wan.folder)
    save_file({key.replace("diffusion_model.", "lora_unet_"): value for key, value in tensors.items()}, path)
    refuse("diffusers can't convert it ", path, wan.folder)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"peft_type": "LOKR"}, "its configuration has peft_type=LOKR, r=4"),
        ({"use_dora": True}, "use_dora=True makes it no ordinary LoRA"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights=pissa makes it no ordinary LoRA"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication=.* makes it no ordinary LoRA"),
        ({"megatron_config": {"a": 1}, "megatron_core": "os"}, "megatron_config=.* makes it no ordinary LoRA"),
        ({"not_there_yet": 3}, "not_there_yet=3 makes it no ordinary LoRA"),
        ({"r": 5}, "its configuration is not of its tensors .*; get it again"),
        ({"lora_alpha": "six"}, "its configuration is not of its tensors"),
    ],
)
def test_configurations_of_more_than_a_lora_are_refused(
    wan: Model, changes: dict[str, Any], match: str, tmp_path: Path
) -> None:
    saved = save_peft(wan, tmp_path / "lora")
    edit_config(saved.path, **changes)
    refuse(match, saved.path, wan.folder)


def test_scale_is_a_finite_number(wan: Model) -> None:
    for scale in (float("nan"), float("inf"), "much"):
        with pytest.raises(ValueError, match=f"model.lora_scale={scale} is no finite number; write 1.0"):
            tiny_family("wan", wan.folder, lora_scale=scale)
