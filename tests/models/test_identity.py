"""What a family says it computes with: every byte of it, and nothing of where it lies."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from qvgen.config.leaves import load_leaf
from qvgen.models.tiny import TinyVideoDiT
from qvgen.models.weight_file import ASSETS_DIRECTORY, load_weights, save_weights
from tests.models.family_checks import tiny_family
from tests.models.hub_folders import make_wan_folder
from tests.models.lora_files import Model, make_model, save_diffusers


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return make_model("wan", tmp_path_factory.mktemp("wan") / "model")


@pytest.fixture
def folder(wan: Model, tmp_path: Path) -> Path:
    return shutil.copytree(wan.folder, tmp_path / "elsewhere" / "model")


def changed(left: dict[str, str], right: dict[str, str]) -> set[str]:
    return {name for name in left.keys() | right.keys() if left.get(name) != right.get(name)}


@pytest.mark.parametrize("component", ["transformer", "vae", "text_encoder"])
def test_the_last_bit_of_a_components_weights_counts(component: str, wan: Model, folder: Path) -> None:
    whole = tiny_family("wan", wan.folder)
    family = tiny_family("wan", folder)
    assert family.identity() == whole.identity()
    assert set(whole.identity()) == {"transformer", "vae", "text_encoder", "tokenizer", "scheduler", "model_index"}
    (file,) = (folder / component).glob("*.safetensors")
    content = bytearray(file.read_bytes())
    (header,) = [int.from_bytes(content[:8], "little")]
    tensors = json.loads(content[8 : 8 + header])
    end = max(entry["data_offsets"][1] for entry in tensors.values() if entry.get("shape"))
    assert 8 + header + end == len(content)
    content[-1] ^= 1
    file.write_bytes(content)
    assert changed(tiny_family("wan", folder).identity(), whole.identity()) == {component}


@pytest.mark.parametrize(
    ("file", "part"),
    [
        ("transformer/config.json", "transformer"),
        ("scheduler/scheduler_config.json", "scheduler"),
        ("tokenizer/tokenizer_config.json", "tokenizer"),
        ("model_index.json", "model_index"),
    ],
)
def test_configurations_count(file: str, part: str, wan: Model, folder: Path) -> None:
    content = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**content, "new": 1}))
    assert changed(tiny_family("wan", folder).identity(), tiny_family("wan", wan.folder).identity()) == {part}


def test_what_is_no_part_of_the_model_counts_for_nothing(wan: Model, folder: Path) -> None:
    (folder / "README.md").write_text("a card")
    shutil.rmtree(folder / "text_encoder")  # as it is where captions come from a cache
    assert changed(tiny_family("wan", folder).identity(), tiny_family("wan", wan.folder).identity()) == {"text_encoder"}
    assert tiny_family("wan", None).identity() == {}


def test_a_lora_and_its_scale_count(wan: Model, tmp_path: Path) -> None:
    plain = tiny_family("wan", wan.folder).identity()
    loras = [save_diffusers(wan, tmp_path / str(seed), seed=seed).path for seed in (0, 1)]
    found = [tiny_family("wan", wan.folder, lora=str(path)).identity() for path in loras]
    found.append(tiny_family("wan", wan.folder, lora=str(loras[0]), lora_scale=0.5).identity())
    moved = shutil.copytree(loras[0].parent, tmp_path / "moved") / loras[0].name if loras[0].is_file() else None
    moved = moved or Path(shutil.copytree(loras[0], tmp_path / "moved"))
    assert tiny_family("wan", wan.folder, lora=str(moved)).identity() == found[0]
    assert [changed(plain, one) for one in found] == [{"lora"}] * 3
    assert len({one["lora"] for one in found}) == 3


@pytest.mark.parametrize(("expert", "part"), [("high", "transformer"), ("low", "transformer_2")])
def test_folding_depends_on_the_transformer_that_was_trained_alone(expert: str, part: str, tmp_path: Path) -> None:
    folder = make_wan_folder(tmp_path / "model", "a14b")
    family = tiny_family("wan2.2-a14b", folder, expert=expert)
    assert {"transformer", "transformer_2", "vae"} < set(family.identity())
    assert family.identity(transformer_only=True) == {part: family.identity()[part]}


def test_the_tiny_teachers_weights_count_by_their_bytes(tmp_path: Path) -> None:
    weights = ASSETS_DIRECTORY / TinyVideoDiT.teacher_file
    shutil.copytree(ASSETS_DIRECTORY, tmp_path / "assets")
    same = load_leaf("model", "tiny", weights=str(tmp_path / "assets" / TinyVideoDiT.teacher_file)).identity()
    assert same == load_leaf("model", "tiny").identity()
    tensors = load_weights(weights)
    tensors["proj_out.bias"][0] += 1e-3
    other = load_leaf("model", "tiny", weights=str(save_weights(tensors, tmp_path / "other.safetensors", card={})))
    assert changed(other.identity(), same) == {"transformer"}
