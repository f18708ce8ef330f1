"""Packed models with attention in 8 bits: the student's bits, a manifest that says all, and damage that is refused."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import qvgen
from qvgen.config.leaves import load_leaf
from qvgen.deploy.attention_entry import ATTENTION_VERSION
from qvgen.deploy.checkpoint import check_packed, load_packed, save_packed
from qvgen.deploy.exported_model import find_fits, open_packed
from qvgen.deploy.manifest import file_sha256, read_manifest
from qvgen.deploy.model_card import CardSources, card_of
from qvgen.deploy.packed_fusion import fuse_packed_
from qvgen.errors import UserError
from qvgen.layers.attention_swap import packed_attentions, quantized_attentions
from qvgen.quant.attention_profile import AttentionProfile
from qvgen.verbs.inspect import table
from tests.deploy.test_manifest_fuzz import NASTY, changed, diffusers_verdict, without
from tests.deploy.test_packed_fusion import MODELS, call, fuse_as_elsewhere
from tests.profiles import make_profile

LONG = pytest.mark.skipif(os.environ.get("QVGEN_LONG_TESTS") != "1", reason="more of the same: QVGEN_LONG_TESTS=1")
ATTENTIONS = {
    "wan": ["blocks.0.attn1", "blocks.0.attn2", "blocks.1.attn1", "blocks.1.attn2"],
    "cogvideox": ["transformer_blocks.0.attn1", "transformer_blocks.1.attn1"],
}


def make_student(name: str, num_layers: int = 2, **options: Any) -> nn.Module:
    """A prepared model; with learned factors, they are other ones than at the start."""
    model_class, config, _ = MODELS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = model_class(**{**config, "num_layers": num_layers})
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.2)
        profile = make_profile("paper", weight_bits=4, activation_bits=4)
        attentive = replace(profile, attention=AttentionProfile(**{"kind": "int8", **options}))
        qvgen.prepare(model, profile=attentive, init="rtn", options=qvgen.PrepareOptions(num_noise_bands=5))
        for product in quantized_attentions(model).values():
            for logits in product.parameters():
                nn.init.normal_(logits)
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[nn.Module, Path]]:
    """A student with learned factors, and the folder that it was packed to."""
    made: dict[str, tuple[nn.Module, Path]] = {}

    def get(name: str) -> tuple[nn.Module, Path]:
        if name not in made:
            student, folder = make_student(name, clips=True), tmp_path_factory.mktemp(name)
            packed = copy.deepcopy(student)
            qvgen.fold(packed)
            assert torch.equal(call(name, packed), call(name, student))
            save_packed(packed, folder, base_name=name)
            made[name] = student, folder
        return made[name]

    return get


@pytest.mark.parametrize("name", MODELS)
def test_what_was_trained_is_what_runs(name: str, saved: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    student, folder = saved(name)
    wanted = call(name, student)
    loaded = load_packed(folder)
    assert list(packed_attentions(loaded)) == ATTENTIONS[name]
    assert torch.equal(call(name, loaded), wanted)
    assert torch.equal(call(name, load_packed(folder, kernel="reference")), wanted)
    assert torch.equal(call(name, MODELS[name][0].from_pretrained(folder)), wanted)
    with monkeypatch.context() as patch:
        fuse_as_elsewhere(patch)
        assert torch.equal(call(name, loaded), wanted)


@pytest.mark.parametrize("name", MODELS)
def test_scores_in_8_bits_alone_are_packed_too(name: str, tmp_path: Path) -> None:
    student = make_student(name, num_layers=1, kind="int8_qk", rotation=True, clips=True)
    wanted, both = call(name, student), call(name, make_student(name, num_layers=1, rotation=True, clips=True))
    qvgen.fold(student)
    save_packed(student, tmp_path, base_name=name)
    content = json.loads((tmp_path / "manifest.json").read_text())
    assert {entry["kind"] for entry in content["attentions"]} == {"int8_qk"}
    number = len(content["attentions"])
    assert f"attention with queries and keys in 8 bits: {number}" in table(check_packed(tmp_path), file_bytes=1)
    card = card_of(tmp_path, sources=CardSources(), repository=None)
    assert f"| attention | {number} with queries and keys in 8 bits |" in card
    loaded = load_packed(tmp_path)
    assert torch.equal(call(name, loaded), wanted)
    assert torch.equal(call(name, load_packed(tmp_path, kernel="reference")), wanted)
    assert torch.equal(call(name, MODELS[name][0].from_pretrained(tmp_path)), wanted)
    assert call(name, loaded.to(torch.bfloat16), torch.bfloat16).isfinite().all()
    assert not torch.equal(wanted, both)
    assert any("qk8" in line and "2 x 32" in line for line in table(check_packed(tmp_path), file_bytes=1))
    source = open_packed(tmp_path, names=None)
    with pytest.raises(UserError, match="compute it in 8 bits"):
        find_fits(source, load_leaf("export", "bf16"))


def test_half_precision_leaves_factors_alone(saved: Any) -> None:
    loaded = load_packed(saved("cogvideox")[1])
    before = {name: product.tables() for name, product in packed_attentions(loaded).items()}
    for name, product in packed_attentions(loaded.to(torch.bfloat16)).items():
        tables, kept = product.tables(), before[name]
        assert tables is not None
        assert kept is not None
        assert all(torch.equal(*pair) and pair[0].dtype is torch.float32 for pair in zip(tables, kept, strict=True))
    assert call("cogvideox", loaded, torch.bfloat16).isfinite().all()


@pytest.mark.parametrize(
    ("name", "backend", "clips"),
    [
        ("wan", "eager", True),
        pytest.param("cogvideox", "aot_eager", False, marks=LONG),
        pytest.param("wan", "aot_eager", True, marks=LONG),
    ],
)
def test_one_graph_of_the_whole_model(name: str, backend: str, clips: bool) -> None:
    loaded = make_student(name, num_layers=1, clips=clips)
    qvgen.fold(loaded)
    fuse_packed_(loaded)
    wanted = call(name, loaded)
    torch._dynamo.reset()
    try:
        assert torch.equal(call(name, torch.compile(loaded, fullgraph=True, backend=backend)), wanted)
    finally:
        torch._dynamo.reset()


def test_blocks_whose_projections_are_merged_keep_it() -> None:
    student = make_student("wan", smooth_key=False, exclude=["*.attn2"])
    assert list(quantized_attentions(student)) == ["blocks.0.attn1", "blocks.1.attn1"]
    wanted = call("wan", student)
    qvgen.fold(student)
    assert fuse_packed_(student).merged == 10
    assert torch.equal(call("wan", student), wanted)
    assert not any("attention_product" in key for key in student.state_dict())  # no factors, nothing to store


def test_the_manifest_says_all_of_it(saved: Any) -> None:
    _, folder = saved("wan")
    content = json.loads((folder / "manifest.json").read_text())
    assert content["version"] == ATTENTION_VERSION
    form = {"kind": "int8", "heads": 2, "head_size": 32, "smooth_key": True, "rotation": False, "clips": True}
    assert content["attentions"] == [{"name": name, **form} for name in ATTENTIONS["wan"]]
    lines = table(check_packed(folder), file_bytes=1)
    assert sum("attention" in line and "2 x 32" in line for line in lines) == 4
    assert "attention in 8 bits: 4" in lines
    assert "| attention | 4 in 8 bits |" in card_of(folder, sources=CardSources(), repository=None)


def test_from_pretrained_makes_it_of_full_precision_weights(tmp_path: Path) -> None:
    model_class, config, _ = MODELS["cogvideox"]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = model_class(**config)
    model.save_pretrained(tmp_path)
    profile = make_profile("paper", weight_bits=4, activation_bits=8)
    attentive = replace(profile, attention=AttentionProfile(kind="int8", rotation=True))
    loaded = model_class.from_pretrained(tmp_path, quantization_config=qvgen.QvgenConfig(profile=attentive, init="rtn"))
    qvgen.prepare(model, profile=attentive, init="rtn")
    assert list(packed_attentions(loaded)) == ATTENTIONS["cogvideox"]
    assert torch.equal(call("cogvideox", loaded), call("cogvideox", model.eval()))
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(call("cogvideox", model_class.from_pretrained(tmp_path / "again")), call("cogvideox", loaded))
    odd = replace(profile, attention=AttentionProfile(kind="int8", include=("*.attn7",)))
    with pytest.raises(ValueError, match="matches none of the 2 attentions"):
        model_class.from_pretrained(tmp_path, quantization_config=qvgen.QvgenConfig(profile=odd, init="rtn"))


def test_a_model_without_it_is_as_before(tmp_path: Path) -> None:
    model_class, config, _ = MODELS["wan"]
    model = model_class(**config)
    qvgen.prepare(model, profile=make_profile("paper", weight_bits=4, activation_bits=4), init="rtn")
    qvgen.fold(model)
    content = save_packed(model, tmp_path).to_dict()
    assert content["version"] == 1
    assert "attentions" not in content


def test_every_value_of_an_attention_may_be_anything(saved: Any, tmp_path: Path) -> None:
    source = saved("wan")[1]
    for file in source.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    whole, refused = json.loads((source / "manifest.json").read_text()), 0
    places: list[tuple[Any, ...]] = [
        ("attentions",),
        ("attentions", 1),
        *(("attentions", 1, k) for k in whole["attentions"][1]),
    ]
    for index, place in enumerate(places):
        for value in [*NASTY[index % 3 :: 3], None]:
            if type(value) is bool and place[-1] in ("smooth_key", "rotation"):
                continue  # either is for the manifest to say
            content = without(whole, place) if value is None else changed(whole, place, value)
            if content == whole:
                continue
            text = json.dumps(content)
            (tmp_path / "manifest.json").write_text(text)
            with pytest.raises(ValueError, match=".") as caught:
                check_packed(tmp_path)
            assert str(tmp_path) in str(caught.value)
            assert len(str(caught.value).splitlines()) == 1
            refused += 1
            if refused % 8 == 0:
                assert diffusers_verdict(tmp_path, text)
    assert refused > 60


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["attentions"][0].update(heads=4), "2 heads of 32|of 4 heads of 32 does not fit"),
        (
            lambda c: c["attentions"][0].update(heads=4, head_size=16),
            "of 4 heads of 16 does not fit the model's 2 of 32",
        ),
        (
            lambda c: c["attentions"][0].update(clips=False),
            "attention_product.key_clip', which the manifest does not know",
        ),
        (lambda c: c["attentions"].append(c["attentions"][0]), "names the attention 'blocks.0.attn1' twice"),
        (lambda c: c["attentions"][0].update(name="blocks.0.ffn"), "names the attention 'blocks.0.ffn', which Wan"),
        (lambda c: c.update(attentions=[], version=1), "attention_product.key_clip', which the manifest does not know"),
        (lambda c: c.update(version=1), "has version 1; this qvgen reads version 3"),
        (
            lambda c: c.update(version=2),
            "reads version 3; attention in 8 bits is another arithmetic since version 3, export",
        ),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused(change: Any, message: str, saved: Any, tmp_path: Path) -> None:
    for file in saved("wan")[1].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    content = json.loads((tmp_path / "manifest.json").read_text())
    change(content)
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        load_packed(tmp_path)


def test_factors_out_of_their_range_are_refused(saved: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    for file in saved("wan")[1].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["blocks.1.attn2.attention_product.key_clip"][0, 0] = -1.0
    save_file(tensors, tmp_path / "model.safetensors")
    manifest = replace(read_manifest(tmp_path), sha256=file_sha256(tmp_path / "model.safetensors"))
    (tmp_path / "manifest.json").write_bytes(manifest.to_json())
    message = r"'blocks.1.attn2.attention_product.key_clip' holds values from -1 to .* must be in 0..2"
    with pytest.raises(ValueError, match=message):
        load_packed(tmp_path)
    with pytest.raises(ValueError, match=message):
        MODELS["wan"][0].from_pretrained(tmp_path)


def test_targets_of_other_runtimes_refuse_it_by_name(saved: Any) -> None:
    source = open_packed(saved("wan")[1], names=None)
    message = "blocks.0.attn1 and 3 others compute it in 8 bits; export=diffusers or export=hub keeps them"
    for name in ("bf16", "torchao"):
        with pytest.raises(UserError, match=message):
            find_fits(source, load_leaf("export", name))
    assert not any(fit.reasons for fit in find_fits(source, load_leaf("export", "diffusers")).values())
