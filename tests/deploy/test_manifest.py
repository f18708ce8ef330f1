"""manifest.json: complete, and refused with its path and the reason where anything in it is wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qvgen.deploy.checkpoint import load_packed
from qvgen.deploy.manifest import LayerEntry, Manifest, file_sha256, layer_entry, read_manifest
from qvgen.layers.layer_spec import layer_spec
from qvgen.layers.packed_linear import PackedLinear
from tests.layers.model import BANDS, make_layer
from tests.runs import train_config

Change = Callable[[dict[str, Any]], object]


@pytest.fixture
def packed(short_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(short_run / "packed", tmp_path / "packed"))


def test_the_manifest_says_everything(short_run: Path) -> None:
    content = json.loads((short_run / "packed" / "manifest.json").read_text())
    model = train_config().model
    assert content["format"] == "qvgen-packed"
    assert content["version"] == 1
    assert content["base"]["name"] == "tiny"
    assert content["base"]["revision"] == model.revision
    assert content["base"]["transformer"] == "WanTransformer3DModel"
    assert content["base"]["config"]["num_layers"] == 3
    assert content["sha256"] == file_sha256(short_run / "packed" / "model.safetensors")
    assert content["training"] == {"method": "qvgen", "init": "mse", "bits": "3", "seed": 42, "steps": 12}
    assert len(content["layers"]) == 36
    assert content["skipped"] == []
    layer = next(layer for layer in content["layers"] if layer["name"] == "proj_out")
    assert 0 < layer.pop("weight_error") < 0.5
    # 3 bits: 64 x 48 codes, scale and zero point per row, bias, two tables of 50 clips
    expected_bytes = 48 * 64 * 3 // 8 + 48 * (4 + 1) + 48 * 4 + 2 * 50 * 4
    assert layer == {
        "name": "proj_out",
        "shape": [48, 64],
        "bits": 3,
        "granularity": "per_channel",
        "zero_point": "integer",
        "group_size": None,
        "scale_dtype": "float32",
        "bias": True,
        "activation": {
            "bits": 3,
            "granularity": "per_token",
            "zero_point": "integer",
            "group_size": None,
            "scale_dtype": "float32",
            "arithmetic": "reciprocal",
            "clip": True,
            "range": "dynamic",
            "clip_table": 50,
        },
        "rotation": 0,
        "rotation_kind": "sylvester",
        "input_scale": False,
        "branch_rank": 0,
        "plan": None,
        "profile": "paper",
        "bytes": expected_bytes,
    }


def test_reading_what_was_written_gives_the_same_manifest(short_run: Path) -> None:
    manifest = read_manifest(short_run / "packed")
    assert Manifest.from_json(manifest.to_json(), source="memory") == manifest


def test_a_file_from_before_other_runtimes_arithmetics_keeps_its_meaning(short_run: Path) -> None:
    content = json.loads((short_run / "packed" / "manifest.json").read_text())
    for layer in content["layers"]:
        del layer["rotation_kind"], layer["activation"]["arithmetic"], layer["activation"]["clip"]
        layer["rotation"] = 16  # it was Sylvester's
    old = Manifest.from_json(json.dumps(content).encode(), source="memory")
    profile = old.layers[0].form.profile
    assert (profile.rotation, profile.rotation_kind) == (16, "sylvester")
    assert (profile.activation.arithmetic, profile.activation.clip) == ("reciprocal", True)


@pytest.mark.parametrize("name", ["convrot", "int8", "svdq_g64"])
def test_another_runtimes_arithmetic_comes_back_from_the_manifest(name: str) -> None:
    layer = PackedLinear.from_fake_quant(make_layer(name))
    entry = layer_entry("proj", layer)
    again = LayerEntry.from_dict(entry.to_dict(num_noise_bands=BANDS))
    assert again == entry
    assert again.form.profile.activation.arithmetic == {"svdq_g64": "unrounded"}.get(name, "division")
    assert not again.form.profile.activation.clip
    assert layer.spec == layer_spec(again.form, in_features=layer.in_features, out_features=layer.out_features)


def first_layer(content: dict[str, Any]) -> dict[str, Any]:
    layer: dict[str, Any] = content["layers"][0]
    return layer


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(format="gguf"), "is no manifest of format 'qvgen-packed'"),
        (lambda c: c.update(version=2), "has version 2; this qvgen reads version 1"),
        (lambda c: c.pop("version"), "has version None; this qvgen reads version 1"),
        (lambda c: c.pop("layers"), "lacks 'layers'"),
        (lambda c: c.pop("sha256"), "lacks 'sha256'"),
        (lambda c: c.update(base=None), "is malformed"),
        (lambda c: c["base"].update(transformer="os.system"), "transformer class 'os.system' is no model of diffusers"),
        (
            lambda c: c["base"].update(transformer="FluxTransformer2DModel"),
            "base.config.patch_size",
        ),
        (lambda c: c["base"]["config"].update(num_layers="many"), "base.config.num_layers='many' is no whole number"),
        (
            lambda c: c["base"]["config"].update(patch_size=[1, 0, 4]),
            "base.config.patch_size=0 is no whole number from 1",
        ),
        (lambda c: c["base"]["config"].update(patch_size=[1, 4]), "does not fit the model's Linear of shape"),
        (
            lambda c: c["base"]["config"].update(in_channels=2**62),
            "its configuration builds no WanTransformer3DModel: ",
        ),
        (
            lambda c: c["base"]["config"].update(in_channels=2**40),
            "patch_embedding.weight' has shape .*, the manifest asks",
        ),
        (lambda c: c["base"]["config"].update(eps=-1e-6), "base.config.eps=-1e-06 is not above 0"),
        (
            lambda c: c["base"]["config"].update(num_layers=2**31),
            "blocks of 27 tensors are more than the 276 tensors of",
        ),
        (lambda c: c["base"]["config"].update(num_layers=4), "lacks the tensor 'blocks.3"),
        (
            lambda c: c["base"]["config"].update(rope_max_seq_len=10**9),
            "asks for tables of 128000000000 bytes .rope.freqs_cos",
        ),
        (lambda c: first_layer(c).update(rotation=10**30), "is no JSON .the number 10{19}... is longer than 64 bits"),
        (lambda c: first_layer(c).update(rotation=2**40), "rotation=1099511627776 is no whole number from 0 to 64"),
        (lambda c: c["base"]["arguments"].update(path="/etc"), "base arguments name 'path', which is of one machine"),
        (lambda c: c.update(skipped=["blocks.0.attn1.to_q"]), "is skipped and is PackedLinear, no Linear"),
        (lambda c: c.update(sha256="0" * 63), "is no sha256 of 64 hex digits"),
        (
            lambda c: c["base"]["config"].update(colour="red"),
            "base.config has 'colour', which WanTransformer3DModel does not",
        ),
        (lambda c: c["base"]["config"].update(num_layers=2), "names the layer 'blocks.2"),
        (lambda c: c.update(num_noise_bands=7), "clip_table=50 of a layer is not num_noise_bands=7"),
        (lambda c: c.update(num_noise_bands=0), "num_noise_bands=0 is no whole number from 1 to"),
        (lambda c: first_layer(c).pop("bits"), "lacks 'bits'"),
        (lambda c: first_layer(c).update(bits=9), "is malformed: .*bits=9"),
        (lambda c: first_layer(c).update(bits="3"), "is malformed: "),
        (lambda c: first_layer(c).update(bits=4), r"codes' has shape .*, the manifest asks for"),
        (lambda c: first_layer(c).update(zero_point="imaginary"), "is malformed: .*imaginary"),
        (lambda c: first_layer(c).update(zero_point="none"), "weight_zero_point', which the manifest does not know"),
        (lambda c: first_layer(c).update(shape=[64]), "is malformed"),
        (lambda c: first_layer(c).update(shape=[64, -64]), "a size of shape=-64 is no whole number from 1 to"),
        (
            lambda c: first_layer(c).update(shape=[64, 32]),
            r"of shape \[64, 32\] does not fit the model's Linear of shape \[64, 64\]",
        ),
        (lambda c: first_layer(c).update(bias=False), "bias', which the manifest does not know"),
        (lambda c: first_layer(c).update(name="blocks.7.attn1.to_q"), "names the layer 'blocks.7.attn1.to_q', which"),
        (lambda c: first_layer(c).update(name="blocks.0.attn1"), "does not fit the model's WanAttention"),
        (lambda c: first_layer(c).update(rotation=48), "rotation"),
        (
            lambda c: first_layer(c)["activation"].update(range="static"),
            "activation range 'static' of a per_token grid",
        ),
        (lambda c: c.update(timesteps=[5.0, 3.0]), "timesteps of tables must rise"),
        (lambda c: first_layer(c).update(branch_rank=4), "lacks the tensor '.*branch_down'"),
        (lambda c: first_layer(c).update(branch_rank=1000), "branch_rank=1000 is no whole number from 0 to 64"),
        (lambda c: first_layer(c).update(plan={"bands": [], "switch": []}), "says nothing"),
        (lambda c: first_layer(c).update(plan={"bands": [[4, 4]], "switch": []}), "1 bands and the model 50"),
        (lambda c: first_layer(c).update(plan={"bands": [], "switch": [4, 8]}), "lacks the tensor '.*clip_low_"),
        (lambda c: first_layer(c)["activation"].pop("bits"), "is malformed|lacks"),
        (lambda c: c["layers"].pop(0), "lacks the tensor 'condition_embedder.time_embedder.linear_1.weight'"),
        (lambda c: c["layers"].append(first_layer(c)), "does not fit the model's PackedLinear"),
        (lambda c: c.update(guided=True), "timesteps of guided tables=None is no list"),
        (
            lambda c: c.update(guided=True, timesteps=[1.0, 2.0]),
            "num_noise_bands=50 is not two for each of its 2 timesteps",
        ),
        (lambda c: c.update(layers=[]), "it names no packed layer"),
    ],
)
def test_a_wrong_manifest_is_refused_with_its_reason(packed: Path, change: Change, message: str) -> None:
    path = packed / "manifest.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message) as caught:
        load_packed(packed)
    assert len(str(caught.value).splitlines()) == 1
    assert str(packed) in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\x00\xff"], ids=["empty", "cut", "list", "null", "binary"])
def test_what_is_no_manifest_is_refused(packed: Path, text: str) -> None:
    (packed / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match=r"manifest.json is no (JSON|manifest)"):
        read_manifest(packed)


def test_a_truncated_manifest_is_refused(packed: Path) -> None:
    path = packed / "manifest.json"
    whole = path.read_text()
    for length in (1, len(whole) // 3, len(whole) - 3):
        path.write_text(whole[:length])
        with pytest.raises(ValueError, match=r"manifest.json is no JSON .*; export the checkpoint again"):
            read_manifest(packed)


def test_a_missing_manifest_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"manifest.json is missing; give a packed directory"):
        read_manifest(tmp_path)
