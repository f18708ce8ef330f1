"""Packed directories: what is read is what was saved, bit for bit, and nothing else is ever accepted."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import qvgen
from qvgen.deploy.checkpoint import load_packed, save_packed
from qvgen.deploy.manifest import file_sha256, read_manifest
from qvgen.layers.packed_linear import PackedLinear
from qvgen.layers.swap import packed_layers
from tests.parts import prepared
from tests.runs import train_config

LAYER = "blocks.1.ffn.net.2"
Change = Callable[[dict[str, Any]], object]


@pytest.fixture
def packed(short_run: Path, tmp_path: Path) -> Path:
    """A copy of a run's packed directory, alone."""
    return Path(shutil.copytree(short_run / "packed", tmp_path / "packed"))


def call(model: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
    """Output of a transformer on two samples of different noise bands."""
    config = model.config
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        return model(
            hidden_states=torch.randn(2, config.in_channels, 8, 16, 16, generator=generator).to(dtype),
            timestep=torch.tensor([900.0, 120.0]),
            encoder_hidden_states=torch.randn(2, 3, config.text_dim, generator=generator).to(dtype),
            return_dict=False,
        )[0]


def edit_manifest(packed: Path, change: Change) -> None:
    path = packed / "manifest.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def edit_tensors(packed: Path, change: Change) -> None:
    """Change the tensors and make the manifest's checksum fit again."""
    path = packed / "model.safetensors"
    tensors: dict[str, Any] = {name: value.clone() for name, value in load_file(path).items()}
    change(tensors)
    path.unlink()
    save_file(tensors, path)
    edit_manifest(packed, lambda content: content.update(sha256=file_sha256(path)))


def test_saving_what_was_loaded_gives_the_same_files(packed: Path, tmp_path: Path) -> None:
    model = qvgen.load_packed(packed)
    assert isinstance(model, WanTransformer3DModel)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not any(parameter.is_meta for parameter in [*model.parameters(), *model.buffers()])
    manifest = read_manifest(packed)
    written = save_packed(
        model,
        tmp_path / "again",
        base_name=manifest.base_name,
        base_revision=manifest.base_revision,
        base_arguments=manifest.base_arguments,
        training=manifest.training,
    )
    assert written == manifest
    for name in ("model.safetensors", "manifest.json"):
        assert (tmp_path / "again" / name).read_bytes() == (packed / name).read_bytes()
    again = qvgen.load_packed(tmp_path / "again")
    assert torch.equal(call(again), call(model))


def test_a_model_that_is_given_is_filled_in_place(packed: Path) -> None:
    reference = load_packed(packed)
    given = train_config().model.load_teacher()
    loaded = load_packed(packed, model=given)
    assert loaded is given
    assert list(packed_layers(given)) == list(packed_layers(reference))
    assert torch.equal(call(given), call(reference))


def test_a_model_of_another_configuration_is_refused(packed: Path) -> None:
    family = train_config("model.num_layers=2").model
    with pytest.raises(ValueError, match="another configuration than .*manifest.json says"):
        load_packed(packed, model=family.initial_transformer(0))


def test_half_precision_leaves_codes_scales_and_clips_alone(packed: Path) -> None:
    model = load_packed(packed)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    output = call(model)
    model.to(torch.bfloat16)
    layers = packed_layers(model)
    for name, value in model.state_dict().items():
        if name.rpartition(".")[0] in layers:
            assert value.dtype == before[name].dtype, name
            assert torch.equal(value, before[name]), name
    assert model.blocks[0].attn1.norm_q.weight.dtype == torch.bfloat16
    half = call(model, torch.bfloat16)
    assert half.dtype == torch.bfloat16
    # bfloat16 has 8 bits of precision; inputs that flip a 3-bit code add to that.
    assert (half.float() - output).norm() / output.norm() < 0.2


def test_a_packed_layer_compiles_whole(packed: Path) -> None:
    layer = load_packed(packed).get_submodule(LAYER)
    assert isinstance(layer, PackedLinear)
    layer.noise_band.set_timestep(torch.tensor([900.0, 120.0]))
    x = torch.randn(2, 7, layer.in_features, generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), layer(x))


def test_kernels_are_asked_for_by_name(packed: Path) -> None:
    assert torch.equal(call(load_packed(packed, kernel="reference")), call(load_packed(packed)))
    with pytest.raises(ValueError, match="kernel='fast' is unknown"):
        load_packed(packed, kernel="fast")


def test_models_that_are_not_folded_are_refused(tmp_path: Path) -> None:
    config = train_config()
    teacher = config.model.load_teacher()
    with pytest.raises(ValueError, match="has no packed layer; prepare, train and fold it first"):
        save_packed(teacher, tmp_path / "out")
    student, _ = prepared(config)
    with pytest.raises(ValueError, match=r"condition_embedder.*linear_1 and 35 other layers are not folded"):
        save_packed(student, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_class_that_no_manifest_may_name_is_refused(packed: Path, tmp_path: Path) -> None:
    layer = load_packed(packed).get_submodule(LAYER)
    with pytest.raises(ValueError, match="transformer class 'Sequential' is no model of diffusers"):
        save_packed(nn.Sequential(layer), tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{LAYER}.codes"), rf"lacks the tensor '{LAYER}.codes'"),
        (lambda t: t.pop("proj_out.bias"), "lacks the tensor 'proj_out.bias'"),
        (lambda t: t.pop("patch_embedding.weight"), "lacks the tensor 'patch_embedding.weight'"),
        (
            lambda t: t.update({f"{LAYER}.codes": t[f"{LAYER}.codes"][:, 1:].contiguous()}),
            rf"'{LAYER}.codes' has shape \[64, 31\], the manifest asks for \[64, 32\]",
        ),
        (
            lambda t: t.update({f"{LAYER}.weight_scale": torch.ones(3)}),
            r"has shape \[3\], the manifest asks for \[64\]",
        ),
        (
            lambda t: t.update({f"{LAYER}.weight_scale": t[f"{LAYER}.weight_scale"].half()}),
            "weight_scale' is F16, F32 is needed",
        ),
        (
            lambda t: t.update({f"{LAYER}.codes": t[f"{LAYER}.codes"].float()}),
            "codes' is F32, U8 is needed",
        ),
        (lambda t: t.update(surplus=torch.ones(1)), "holds the tensor 'surplus', which the manifest does not know"),
    ],
)
def test_tensors_that_do_not_fit_the_manifest_are_refused(packed: Path, change: Change, message: str) -> None:
    edit_tensors(packed, change)
    with pytest.raises(ValueError, match=message) as caught:
        load_packed(packed)
    assert str(packed / "model.safetensors") in str(caught.value)


def test_damaged_weights_are_refused(packed: Path) -> None:
    path = packed / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"has sha256 .*, the manifest says .*; the copy is damaged"):
        load_packed(packed)
    path.write_bytes(content[:1000])
    edit_manifest(packed, lambda manifest: manifest.update(sha256=file_sha256(path)))
    with pytest.raises(ValueError, match="is no safetensors file"):
        load_packed(packed)
    path.unlink()
    with pytest.raises(ValueError, match="model.safetensors is missing; copy the whole packed directory"):
        load_packed(packed)
