"""Values of packed tensors and of what is folded: finite and in their range, or refused by tensor and file."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qvgen.cli import BAD_INPUT, main
from qvgen.deploy.checkpoint import check_packed, load_packed, save_packed
from qvgen.deploy.manifest import file_sha256
from qvgen.layers.swap import fold, folded_copy, packed_layers, quantized_layers
from tests.parts import prepared
from tests.runs import train_config

LAYER = "blocks.1.ffn.net.2"
Change = Callable[[dict[str, Tensor]], object]


@pytest.fixture
def packed(short_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(short_run / "packed", tmp_path / "packed"))


def edit(packed: Path, change: Change) -> None:
    """Change tensors, with the sha256 that fits."""
    file, manifest = packed / "model.safetensors", packed / "manifest.json"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    content = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(content | {"sha256": file_sha256(file)}))


def put(name: str, value: float) -> Change:
    return lambda tensors: tensors[name].view(-1)[-1:].fill_(value)


CASES = [
    (f"{LAYER}.weight_scale", math.nan, "holds 1 NaN among 64 values"),
    (f"{LAYER}.weight_scale", math.inf, "holds 1 infinity among 64 values"),
    (f"{LAYER}.weight_scale", 0.0, "holds values from 0 to .*, which must be in 1e-45..inf"),
    (f"{LAYER}.weight_scale", -1.0, "holds values from -1 to"),
    (f"{LAYER}.weight_zero_point", 8, r"holds values from \d to 8, which must be in 0..7"),
    (f"{LAYER}.clip_low", math.nan, "holds 1 NaN among 50 values"),
    (f"{LAYER}.clip_high", math.inf, "holds 1 infinity among 50 values"),
    (f"{LAYER}.clip_high", 1.5, "to 1.5, which must be in 0..1"),
    (f"{LAYER}.bias", -math.inf, "holds 1 infinity among 64 values"),
    ("patch_embedding.bias", math.nan, "holds 1 NaN among 64 values"),
    ("scale_shift_table", math.inf, "holds 1 infinity among 128 values"),
]


@pytest.mark.parametrize(("name", "value", "message"), CASES)
def test_values_that_mean_nothing_are_refused_by_tensor_and_file(
    packed: Path, name: str, value: float, message: str
) -> None:
    edit(packed, put(name, value))
    for read in (load_packed, check_packed):
        with pytest.raises(ValueError, match=f"'{name}'.* {message}.*; fold the run's checkpoint again") as caught:
            read(packed)
        assert str(caught.value).startswith(str(packed / "model.safetensors"))
        assert len(str(caught.value).splitlines()) == 1


def test_no_verb_goes_on_with_such_a_file(packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(packed, put(f"{LAYER}.weight_scale", math.nan))
    for command in (["inspect", f"packed={packed}"], ["generate", f"packed={packed}", f"out={tmp_path / 'out'}"]):
        assert main(command) == BAD_INPUT
        shown = capsys.readouterr()
        assert shown.out == ""
        assert f"'{LAYER}.weight_scale', float32 [64], holds 1 NaN" in shown.err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_a_given_model_is_left_alone(packed: Path) -> None:
    edit(packed, put("proj_out.bias", math.nan))
    given = train_config().model.initial_transformer(0)
    before = {name: value.clone() for name, value in given.state_dict().items()}
    with pytest.raises(ValueError, match="'proj_out.bias'"):
        load_packed(packed, model=given)
    edit(packed, lambda tensors: tensors.update({"proj_out.bias": torch.zeros(48), "surplus": torch.zeros(1)}))
    with pytest.raises(ValueError, match="holds the tensor 'surplus'"):
        load_packed(packed, model=given)
    assert not packed_layers(given)
    assert all(torch.equal(value, before[name]) for name, value in given.state_dict().items())


@pytest.mark.parametrize(("name", "value", "message"), CASES[::3])
def test_nothing_of_the_kind_is_written(packed: Path, tmp_path: Path, name: str, value: float, message: str) -> None:
    model = load_packed(packed)
    with torch.no_grad():
        put(name, value)(model.state_dict())
    target = tmp_path / "again"
    with pytest.raises(ValueError, match=f"again/model.safetensors: '{name}'.* {message}"):
        save_packed(model, target)
    assert list(target.glob("*")) == []


@pytest.mark.parametrize(("dtype", "name"), [(torch.float64, "F64"), (torch.float8_e5m2, "F8_E5M2")])
def test_other_weights_are_in_the_types_that_run(packed: Path, dtype: torch.dtype, name: str) -> None:
    edit(packed, lambda tensors: tensors.update(scale_shift_table=tensors["scale_shift_table"].to(dtype)))
    with pytest.raises(ValueError, match=f"'scale_shift_table' is {name}, F32 or BF16 or F16 is needed"):
        load_packed(packed)


def test_inspect_counts_the_bytes(packed: Path) -> None:
    assert check_packed(packed).transformer == "WanTransformer3DModel"
    content = json.loads((packed / "manifest.json").read_text())
    content["layers"][3]["bytes"] += 1
    (packed / "manifest.json").write_text(json.dumps(content))
    name, found = content["layers"][3]["name"], content["layers"][3]["bytes"] - 1
    with pytest.raises(ValueError, match=rf"manifest.json: the layer '{name}' has {found} bytes, not {found + 1}"):
        check_packed(packed)


def test_a_fold_names_the_tensor_and_changes_nothing() -> None:
    student, _ = prepared(train_config("method=lsq"))
    layers = quantized_layers(student)
    layer = layers[LAYER]
    cases = {
        f"{LAYER}.weight": layer.weight,
        f"{LAYER}.weight_quantizer.scale": layer.weight_quantizer.scale,
        f"{LAYER}.activation_quantizer.clip_high": layer.activation_quantizer.clip_high,
        "patch_embedding.weight": student.patch_embedding.weight,
        "scale_shift_table": student.scale_shift_table,
    }
    for name, tensor in cases.items():
        with torch.no_grad():
            place = tensor.view(-1)[:1]
            before = place.clone()
            place.fill_(math.nan)
        for make in (fold, folded_copy):
            with pytest.raises(
                ValueError, match=f"^cannot fold: '{name}', float32 .* holds 1 NaN among .*; take an earlier"
            ):
                make(student)
        assert quantized_layers(student).keys() == layers.keys()
        with torch.no_grad():
            place.copy_(before)
    assert fold(student) == len(layers)
