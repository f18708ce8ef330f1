"""What is no LoRA, not one of the model, or more than a LoRA is refused: in one line, with the path and what to do."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
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
    tiny_family("wan", wan.folder, lora=str(file)).load_teacher()  # with the configuration beside it
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
        ({key: torch.zeros((0, 32) if "lora_A" in key else (32, 0)) for key in tensors if key.startswith(first[:-13])},
            r"A \[0, 32\] of \S+ has rank 0; use a LoRA of"),
        ({"transformer_2." + first: tensors[first].clone()}, rf"transformer_2.{first} is not of transformer; use a LoRA of"),
        ({"text_encoder.lora_A.weight": tensors[first].clone()}, "text_encoder.lora_A.weight matches no layer"),
        ({"transformer.norm_out.lora_A.weight": tensors[first].clone()}, "norm_out.lora_A.weight matches no layer"),
        ({first.replace("lora_A.weight", "alpha"): torch.ones(2)}, r"to_q.alpha \[2\] is no number; use a LoRA of"),
        ({first.replace("lora_A.weight", "lora_magnitude_vector"): torch.ones(32)}, "vector is no LoRA's .but of DoRA"),
        ({first.replace("lora_A.weight", "dora_scale"): torch.ones(32)}, r"to_q.dora_scale is no LoRA's .but of DoRA"),
        ({first.replace("lora_A.weight", "hada_w1_a"): torch.ones(32)}, r"to_q.hada_w1_a is no LoRA's .but of LyCORIS"),
        ({first.replace("lora_A.weight", "weight"): torch.ones(32)}, r"to_q.weight is no LoRA's .but of no kind"),
        ({first.replace("lora_A.weight", "lora_A.other.weight"): tensors[first].clone()}, "are both of .*to_q; keep one"),
        ({first.replace("lora_A.weight", "diff"): torch.ones(3)}, r"to_q.diff \[3\] does not fit .*to_q.weight \[32, 32\]"),
        ({first.replace("lora_A.weight", "diff_m"): torch.ones(3)}, r"to_q.diff_m matches no layer"),
    ):  # fmt: skip
        save_file(tensors | change, path)
        refuse(match, path, model.folder, model.name)
    save_file({key: value for key, value in tensors.items() if key != first}, path)
    refuse(r"attn1.to_q lacks its lora_A.weight", path, model.folder, model.name)


def test_keys_of_layers_that_the_model_does_not_have_are_refused_by_name(wan: Model, tmp_path: Path) -> None:
    """Diffusers would drop some of these with a line in its debug log, and fail at others with a traceback."""
    down = {f"diffusion_model.blocks.{block}.self_attn.q.lora_down.weight": torch.ones(2, 32) for block in range(2)}
    tensors = down | {key.replace("down", "up"): torch.ones(32, 2) for key in down}
    path = tmp_path / "lora.safetensors"
    save_file(tensors, path)
    tiny_family("wan", wan.folder, lora=str(path)).load_teacher()
    for key, shape, match in (
        ("blocks.0.cross_attn.norm_k_img.diff", [32], "matches no layer"),  # image to video
        ("blocks.0.cross_attn.k_img.lora_down.weight", [2, 32], "matches no layer"),
        ("blocks.9.self_attn.q.lora_down.weight", [2, 32], "matches no layer"),  # of a bigger model
        ("blocks.0.unknown.lora_down.weight", [2, 32], "matches no layer"),
        ("blocks.0.norm3.lora_down.weight", [2, 32], "matches no layer"),  # no Linear
        ("blocks.0.norm2.diff", [32], ""),  # diffusers' name, accepted
        ("blocks.0.self_attn.norm_q.diff_b", [32], r"is of blocks.0.attn1.norm_q.bias, which the model does not have"),
        ("blocks.0.diff_m", [1, 6, 31], r"\[1, 6, 31\] does not fit blocks.0.scale_shift_table \[1, 6, 32\]"),
        ("patch_embedding.diff", [32, 36, 1, 2, 2], r"does not fit patch_embedding.weight \[32, 4, 1, 2, 2\]"),
    ):
        save_file(tensors | {f"diffusion_model.{key}": torch.zeros(shape)}, path)  # zeros are no reason to drop a key
        if match:
            refuse(f"diffusion_model.{key} .*{match}", path, wan.folder)
        else:
            tiny_family("wan", wan.folder, lora=str(path)).load_teacher()
    for half in ("down", "up"):
        save_file({key: value for key, value in tensors.items() if half in key}, path)
        refuse(f"attn1.to_q lacks its lora_{'B' if half == 'down' else 'A'}.weight", path, wan.folder)


def test_a_configuration_and_an_alpha_that_differ(wan: Model, tmp_path: Path) -> None:
    saved = save_diffusers(wan, tmp_path / "lora")
    with safe_open(saved.path, framework="pt") as stream:
        header = stream.metadata()
    alpha = {"transformer.blocks.0.attn1.to_q.alpha": torch.tensor(1.0)}
    save_file(load_file(saved.path) | alpha, saved.path, metadata=header)
    tiny_family("wan", wan.folder, lora=str(saved.path)).load_teacher()  # both say 1 / 3
    save_file(load_file(saved.path) | {key: value * 2 for key, value in alpha.items()}, saved.path, metadata=header)
    refuse(r"to_q.alpha makes alpha / rank 0.66\d+, its configuration 0.33\d+; get it again", saved.path, wan.folder)


def test_several_files_in_one_folder(wan: Model, tmp_path: Path) -> None:
    saved = save_diffusers(wan, tmp_path / "lora")
    only = saved.path.rename(saved.path.with_name("style.safetensors"))
    wanted = tiny_family("wan", wan.folder, lora=str(only))
    assert tiny_family("wan", wan.folder, lora=str(only.parent)).revision == wanted.revision
    shutil.copy(only, only.with_name("other.safetensors"))
    refuse(
        "it holds 2 files .other.safetensors, style.safetensors.; write the path of one, or a list",
        only.parent,
        wan.folder,
    )


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


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), "much", True, None])
def test_scale_is_a_finite_number(wan: Model, scale: Any) -> None:
    with pytest.raises(ValueError, match=f"model.lora_scale={scale} is no finite number; write 1.0"):
        tiny_family("wan", wan.folder, lora_scale=scale)
    with pytest.raises(ValueError, match=f"model.lora_scale={scale} is no finite number; write 1.0"):
        tiny_family("wan", wan.folder, lora_scale=[scale])


@pytest.mark.parametrize(
    ("lora", "scale", "match"),
    [
        (["a", "b"], [1.0], r"model.lora_scale=\[1.0\] has 1 scales for 2 LoRAs; give one for each"),
        ("a", [1.0, 2.0], r"has 2 scales for 1 LoRAs"),
        ([{"path": "a", "weight": 1}], 1.0, "has the keys path, weight; write path and scale"),
        ([{"scale": 1}], 1.0, "has the keys scale; write path and scale"),
        ([{"path": "a", "scale": "much"}], 1.0, "model.lora.scale=much is no finite number"),
        ([{"path": "a", "scale": 1}], [1.0], "both give the scale of a; write it once"),
        ([3], 1.0, r"model.lora=\[3\] is no path, and no list of paths; write model.lora=FILE"),
        ("", 1.0, "model.lora= is no path"),
    ],
)
def test_what_is_no_choice_of_loras(lora: Any, scale: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        tiny_family("wan", None, lora=lora, lora_scale=scale)
