"""Single tensors of a model's files against the whole model, which diffusers loads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qvgen.config.leaves import load_leaf
from qvgen.errors import UserError
from tests.models.family_checks import tiny_family
from tests.models.hub_folders import make_cogvideox_folder, make_wan_folder


@pytest.mark.parametrize("name", ["wan", "cogvideox"])
def test_a_folder_is_read_tensor_by_tensor_from_whichever_file_holds_it(name: str, tmp_path: Path) -> None:
    folder = {"wan": make_wan_folder, "cogvideox": make_cogvideox_folder}[name](tmp_path / "hub")
    family = tiny_family(name, folder)
    wanted = family.load_teacher(dtype=torch.float32).state_dict()
    (file,) = (folder / "transformer").glob("*.safetensors")
    tensors = load_file(file)
    halves = dict(list(tensors.items())[::2]), dict(list(tensors.items())[1::2])
    names = [f"diffusion_pytorch_model-0000{part}-of-00002.safetensors" for part in (1, 2)]
    weight_map = {}
    for half, shard in zip(halves, names, strict=True):
        save_file(half, file.parent / shard, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(half, shard)
    file.unlink()
    index = file.parent / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    read = tiny_family(name, folder).tensor_reader()
    assert read is not None
    for tensor in tensors:
        found = read(tensor)
        assert found.dtype == torch.float32
        assert torch.equal(found, wanted[tensor]), tensor
    with pytest.raises(UserError, match=r"transformer lacks blocks\.99\.weight; get it with"):
        read("blocks.99.weight")


def test_a_tensor_that_is_not_finite_is_named_with_its_file(tmp_path: Path) -> None:
    folder = make_wan_folder(tmp_path / "hub")
    (file,) = (folder / "transformer").glob("*.safetensors")
    tensors = load_file(file)
    tensors["blocks.0.attn1.to_q.bias"][0] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    read = tiny_family("wan", folder).tensor_reader()
    assert read is not None
    with pytest.raises(UserError, match=r"model\.safetensors: 'blocks\.0\.attn1\.to_q\.bias'.*1 NaN"):
        read("blocks.0.attn1.to_q.bias")
    read("blocks.0.attn1.to_k.bias")


def test_the_tiny_model_is_read_too() -> None:
    family = load_leaf("model", "tiny")
    read = family.tensor_reader()
    wanted = family.load_teacher().state_dict()
    assert all(torch.equal(read(name), value) for name, value in wanted.items())
