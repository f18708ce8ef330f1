"""A config.json, an index or weights from elsewhere: what from_pretrained refuses, each with a ValueError of one line.

Every value of the packed layers' description is tried by :mod:`tests.deploy.test_manifest_fuzz`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file

import qvgen
from tests.deploy.test_manifest_fuzz import changed
from tests.deploy.test_packed_fusion import make_fake


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    model = make_fake("wan")
    qvgen.fold(model)
    qvgen.save_packed(model, tmp_path / "packed")
    return tmp_path / "packed"


def rewrite(packed: Path, *path: Any, value: Any) -> None:
    """Change one value of config.json."""
    file = packed / "config.json"
    file.write_text(json.dumps(changed(json.loads(file.read_text()), path, value)))


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("quantization_config", "manifest"), None, "has no packed layers; export the checkpoint again"),
        (("quantization_config", "manifest"), [1], "has a quantization_config without a manifest"),
        (("quantization_config",), {"quant_method": "qvgen", "bits": 4, "init": "os.system"}, "has no packed layers"),
        (
            ("quantization_config", "init_object"),
            {"_target_": "os.system"},
            "'init_object', which the method 'qvgen' does not",
        ),
        (("quantization_config", "manifest", "base", "transformer"), "LTXVideoTransformer3DModel", "is of LTXVideo"),
        (("quantization_config", "manifest", "base", "transformer"), "os.system", "is no model of diffusers"),
        (
            ("quantization_config", "manifest", "layers", 3, "name"),
            "rope",
            "does not fit the model's WanRotaryPosEmbed",
        ),
        (("ffn_dim",), 128, r"layer 'blocks.0.ffn.net.0.proj' of shape \[96, 64\] does not fit the model's Linear"),
        (("num_layers",), 3, "config.json: num_layers=3 blocks of 10 Linears are more than the 26 that"),
        (("num_layers",), 2**31, "num_layers=2147483648 blocks of 10 Linears are more than the 26 that"),
        (("rope_max_seq_len",), 2**26, r"asks for tables of \d+ bytes \(rope.freqs_cos"),
        (("num_layers",), -1, "base.config.num_layers"),
        (("num_layers",), "2", "base.config.num_layers"),
        (("patch_size",), [2**12] * 3, "patch_embedding.weight would have 17592186044416 numbers"),
        (("ffn_dim",), 2**40, "ffn.net.0.proj.weight would have 7036"),
        (("num_layers",), 1, "names the layer 'blocks.1."),
        (("out_channels",), 8, "does not fit the model's Linear of shape"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(packed: Path, path: tuple[Any, ...], value: Any, message: str) -> None:
    rewrite(packed, *path, value=value)
    with pytest.raises(ValueError, match=message) as caught:
        WanTransformer3DModel.from_pretrained(packed)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("file", ["../other.safetensors", "/etc/other.safetensors", "sub/other.safetensors"])
def test_an_index_leaves_the_folder_nowhere(packed: Path, file: str) -> None:
    index = packed / "diffusion_pytorch_model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"] = dict.fromkeys(content["weight_map"], file)
    index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="which is not allowed"):
        WanTransformer3DModel.from_pretrained(packed)


def test_pickles_are_never_read_for_packed_layers(packed: Path) -> None:
    (packed / "diffusion_pytorch_model.safetensors.index.json").unlink()
    torch.save(load_file(packed / "model.safetensors"), packed / "diffusion_pytorch_model.bin")
    (packed / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="is no safetensors file, the only kind"):
        WanTransformer3DModel.from_pretrained(packed)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("blocks.0.attn1.to_q.weight_scale", lambda t: t.fill_(float("nan")), "holds 64 NaNs"),
        ("blocks.0.attn1.to_q.weight_scale", lambda t: -t, "must be in 1e-45..inf"),
        ("blocks.0.attn1.to_q.weight_scale", lambda t: t.to(torch.bfloat16), "is BF16, F32 is needed"),
        ("blocks.0.attn1.to_q.codes", lambda t: t[:-1].contiguous(), r"has shape \[63, 32\], the manifest asks"),
        ("scale_shift_table", lambda t: t.fill_(float("inf")), "holds 128 infinities"),
    ],
)  # fmt: skip
def test_tensors_are_held_to_what_load_packed_holds_them_to(packed: Path, name: str, change: Any, message: str) -> None:
    file = packed / "model.safetensors"
    tensors = {key: value.clone() for key, value in load_file(file).items()}
    tensors[name] = change(tensors[name])
    file.unlink()
    save_file(tensors, file)
    with pytest.raises(ValueError, match=message):
        WanTransformer3DModel.from_pretrained(packed)


def test_a_file_that_is_no_safetensors_file_is_refused(packed: Path) -> None:
    content = (packed / "model.safetensors").read_bytes()
    for damaged in (content[: len(content) // 2], content + b"x", b"", b"PK\x03\x04" + content[:100]):
        (packed / "model.safetensors").write_bytes(damaged)
        with pytest.raises(ValueError, match="is no safetensors file"):
            WanTransformer3DModel.from_pretrained(packed)
