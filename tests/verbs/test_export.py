"""`qvgen export`: what is written, what is refused, and what the report says; checked against the packed model's outputs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AllegroTransformer3DModel, CogVideoXTransformer3DModel, WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from safetensors.torch import load_file

from qvgen.cli import BAD_INPUT, DONE, main
from qvgen.deploy.checkpoint import load_packed
from qvgen.deploy.exporters.plain_weight import plain_weight
from qvgen.deploy.fixed_inputs import fixed_inputs
from qvgen.deploy.manifest import file_sha256
from qvgen.layers.swap import packed_layers
from tests.deploy.exporters.packed_models import save, svdquant, tiny_cogvideox, tiny_wan
from tests.runs import snapshot


@pytest.fixture(scope="module")
def convrot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tiny_wan(), tmp_path_factory.mktemp("convrot") / "packed", profile="convrot", bits="w4a4")


@pytest.fixture(scope="module")
def svdq(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With smoothing and a branch of rank 4."""
    folder = tmp_path_factory.mktemp("svdq") / "packed"
    return save(tiny_wan(), folder, profile="svdq_g64", bits="w4a4", init=svdquant(4))


@pytest.fixture(scope="module")
def cogvideox(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cogvideox") / "packed"
    return save(tiny_cogvideox(), folder, profile="svdq_g64", bits="w4a4", name="cogvideox-5b")


def export(packed: Path, out: Path, *words: str) -> int:
    return main(["export", f"packed={packed}", f"out={out}", *words])


def parity(out: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((out / "parity.json").read_text())
    return content


def output(model: Any) -> torch.Tensor:
    inputs = fixed_inputs(model, timestep=500.0)
    assert inputs is not None
    with torch.no_grad():
        result: torch.Tensor = model.float()(**inputs, return_dict=False)[0]
    return result


def test_an_exact_export_says_so(convrot: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    before = snapshot(convrot)
    assert export(convrot, out, "target=comfy", "export.dtype=null") == DONE
    assert "by the target's own arithmetic every value is equal to the packed model's" in capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == ["diffusion_model.safetensors", "parity.html", "parity.json"]
    content = parity(out)
    assert content["exact"] is True
    assert content["model"] == content["model_arithmetic"] == {"relative_error": 0.0, "max_abs": 0.0}
    assert len(content["layers"]) == 10
    first = content["layers"][0]
    assert content["model_half_sums"] is first["half_sums"] is None
    assert first["name"] == "blocks.0.attn1.to_q"
    assert (first["trained"], first["runs_as"]) == ("w4a4", "w4a4")
    assert (first["weight"], first["inputs"], first["weight_reasons"]) == ("as trained", "as trained", [])
    file = out / "diffusion_model.safetensors"
    assert content["files"] == {file.name: {"sha256": file_sha256(file), "bytes": file.stat().st_size}}
    assert content["source"]["sha256"] == json.loads((convrot / "manifest.json").read_text())["sha256"]
    assert snapshot(convrot) == before
    page = (out / "parity.html").read_text()
    assert "every value is equal" in page
    assert "blocks.0.ffn.net.2" in page


def test_the_comfy_file_has_original_names(convrot: Path, tmp_path: Path) -> None:
    assert export(convrot, tmp_path / "out", "target=comfy") == DONE
    tensors = load_file(tmp_path / "out" / "diffusion_model.safetensors")
    layer = "blocks.0.self_attn.q"
    assert tensors[f"{layer}.weight"].shape == (128, 64)
    assert tensors[f"{layer}.weight"].dtype == torch.int8
    assert tensors[f"{layer}.weight_scale"].dtype == torch.float32
    assert json.loads(bytes(tensors[f"{layer}.comfy_quant"].tolist())) == {
        "format": "convrot_w4a4", "convrot_groupsize": 64, "linear_dtype": "int4",
    }  # fmt: skip
    assert tensors["blocks.0.modulation"].dtype == tensors[f"{layer}.bias"].dtype == torch.bfloat16
    assert "head.head.weight" in tensors
    content = parity(tmp_path / "out")
    assert content["exact"] is True  # the arithmetic; biases and the rest are rounded
    assert content["other_weights"] == "bfloat16"
    assert 0 < content["model"]["relative_error"] < 0.05


@pytest.mark.parametrize("layout", ["diffusers", "original"])
def test_the_dequantized_model_is_an_ordinary_one(convrot: Path, tmp_path: Path, layout: str) -> None:
    out = tmp_path / "out"
    assert export(convrot, out, "target=bf16", f"export.layout={layout}", "export.dtype=float32") == DONE
    if layout == "diffusers":
        model = WanTransformer3DModel.from_pretrained(out)
    else:
        model = tiny_wan()
        state = convert_wan_transformer_to_diffusers(load_file(out / "diffusion_model.safetensors"))
        model.load_state_dict(state, strict=True)
    packed = load_packed(convrot, kernel="reference")
    for name, layer in packed_layers(packed).items():
        assert torch.equal(model.get_submodule(name).weight, plain_weight(layer)), name
    assert torch.equal(model.proj_out.weight, packed.proj_out.weight)
    difference = (output(model) - output(packed)).square().sum() / output(packed).square().sum()
    content = parity(out)
    assert content["model"]["relative_error"] == pytest.approx(float(difference), rel=1e-3)
    assert {layer["inputs"] for layer in content["layers"]} == {"not quantized"}


def test_the_dequantized_model_is_in_bfloat16_unless_asked(convrot: Path, tmp_path: Path) -> None:
    assert export(convrot, tmp_path / "out", "target=bf16") == DONE
    tensors = load_file(tmp_path / "out" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


def test_cache_dit_gets_its_directory_and_the_folded_folder(svdq: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert export(svdq, out, "target=cache_dit", "export.rank=16") == DONE
    model = WanTransformer3DModel.from_pretrained(out / "transformer", torch_dtype=torch.bfloat16)
    packed = load_packed(svdq, kernel="reference")
    layer = packed.get_submodule("blocks.0.ffn.net.2")
    assert layer.input_scale is not None
    assert layer.form.branch_rank == 4
    assert torch.equal(model.blocks[0].ffn.net[2].weight, plain_weight(layer).bfloat16())
    assert torch.equal(model.blocks[0].ffn.net[2].bias, layer.bias.bfloat16())
    config = json.loads((out / "svdq" / "quant_config.json").read_text())
    assert (config["quant_type"], config["checkpoint_path"]) == ("svdq_int4_r16", "svdq_int4_r16.safetensors")
    content = parity(out)
    assert {layer["runs_as"] for layer in content["layers"]} == {"w4a4"}
    assert (
        content["model_arithmetic"]["relative_error"] < 0.01
    )  # 1 / smoothing is rounded to bfloat16, which flips codes


def test_a_branch_wants_the_rank_that_it_has(svdq: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert export(svdq, tmp_path / "out", "target=cache_dit") == BAD_INPUT
    (line,) = capsys.readouterr().err.splitlines()
    assert "can't carry 'blocks.0.attn1.to_q': its branch has rank 4, more than export.rank=0; write 16" in line


def test_nunchaku_lite_has_a_config_of_diffusers(cogvideox: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert export(cogvideox, out, "target=nunchaku_lite") == DONE
    config = CogVideoXTransformer3DModel.load_config(out)
    scheme = config["quantization_config"]
    assert scheme["quant_method"] == "nunchaku_lite"
    assert scheme["svdq_w4a4"]["rank"] == 16
    assert len(scheme["svdq_w4a4"]["targets"]) == len(parity(out)["layers"])
    content = parity(out)
    assert content["exact"] is True
    # bfloat16 sums of one or four groups: 2^-9 of a value at most, squared, for each of a few roundings.
    assert all(0 < layer["half_sums"]["relative_error"] < 1e-4 for layer in content["layers"])
    assert 0 < content["model_half_sums"]["relative_error"] < 1e-2
    assert "And with sums in half precision" in (out / "parity.html").read_text()


def test_a_profile_that_is_not_carried_is_refused_with_the_one_that_is(
    short_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert export(short_run / "packed", out, "target=comfy") == BAD_INPUT
    (line,) = capsys.readouterr().err.splitlines()
    assert "target=comfy does not carry profile=paper w3a3 exactly" in line
    assert "inputs of 3 bits" in line
    assert "profile=convrot" in line
    assert "approximate=true" in line
    assert not out.exists()
    assert export(short_run / "packed", out, "target=comfy", "dry_run=true") == DONE
    shown = capsys.readouterr().out
    assert "runs as w4a4 (36)" in shown
    assert "not exact: inputs of 3 bits (36 layers)" in shown
    assert not out.exists()
    assert export(short_run / "packed", out, "target=comfy", "approximate=true") == DONE
    content = parity(out)
    assert (content["exact"], content["approximate"]) == (False, True)
    assert {(layer["trained"], layer["runs_as"]) for layer in content["layers"]} == {("w3a3", "w4a4")}
    assert {layer["weight"] for layer in content["layers"]} == {"quantized again"}
    assert 0 < content["model"]["relative_error"] < 0.5


def test_another_target_that_carries_it_is_named(
    convrot: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export(convrot, tmp_path / "out", "target=cache_dit") == BAD_INPUT
    assert "profile=svdq_g64, choose target=comfy, or write approximate=true" in capsys.readouterr().err


def test_a_refusal_names_profiles_that_the_target_carries_with_its_keys(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = save(tiny_wan(), tmp_path / "row", profile="w4a8_row", bits="w4a8")
    assert export(row, tmp_path / "out", "target=sdnq", "export.quantized_inputs=true") == BAD_INPUT
    assert "`qvgen ptq` with profile=int8, choose target=humming, or write approximate" in capsys.readouterr().err


def test_humming_gets_a_folder_with_its_configuration(
    convrot: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = save(tiny_cogvideox(), tmp_path / "row", profile="w4a8_row", bits="w3a8", name="cogvideox-5b")
    assert export(row, tmp_path / "out", "target=humming") == DONE
    assert "every value is equal to the packed model's" in capsys.readouterr().out
    scheme = CogVideoXTransformer3DModel.load_config(tmp_path / "out")["quantization_config"]
    assert (scheme["quant_method"], scheme["b_dtype"], scheme["a_dtype"]) == ("humming", "uint3", "int8")
    assert "proj_out" in scheme["modules_to_not_convert"]
    tensors = load_file(tmp_path / "out" / "diffusion_pytorch_model.safetensors")
    words = tensors["transformer_blocks.0.attn1.to_q.weight"]
    assert (words.shape, words.dtype) == ((128, 12), torch.int32)
    assert {layer["runs_as"] for layer in parity(tmp_path / "out")["layers"]} == {"w3a8"}
    assert export(convrot, tmp_path / "no", "target=humming") == BAD_INPUT
    line = capsys.readouterr().err
    assert (
        "have weight scales in float32, not bfloat16, weight rotated by regular blocks of 64, inputs of 4 bits" in line
    )
    assert "with profile=w4a8_row, choose target=comfy, or write approximate=true" in line
    assert export(convrot, tmp_path / "anyway", "target=humming", "approximate=true") == DONE
    assert {layer["runs_as"] for layer in parity(tmp_path / "anyway")["layers"]} == {"w4a8"}
    assert 0 < parity(tmp_path / "anyway")["model"]["relative_error"] < 0.5


@pytest.mark.parametrize("target", ["torchao", "sdnq"])
def test_targets_that_dequantize_refuse_other_coordinates(
    convrot: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], target: str
) -> None:
    assert export(convrot, tmp_path / "no", f"target={target}") == BAD_INPUT
    line = capsys.readouterr().err
    assert (
        "have weight rotated by regular blocks of 64; train or `qvgen ptq` with profile=paper or int8 or w4a8_row"
        in line
    )
    assert export(convrot, tmp_path / "out", f"target={target}", "approximate=true") == DONE
    content = parity(tmp_path / "out")
    assert {layer["inputs"] for layer in content["layers"]} == {"not quantized"}
    assert {layer["weight"] for layer in content["layers"]} == {"quantized again"}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == target


def test_cogvideox_is_refused_where_the_runtime_has_none(
    cogvideox: Path, convrot: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in (["target=comfy"], ["target=int8"], ["target=bf16", "export.layout=original"]):
        assert export(cogvideox, tmp_path / "out", *words, "approximate=true") == BAD_INPUT
        (line,) = capsys.readouterr().err.splitlines()
        assert "have the names of the model's own code, and qvgen knows none for 'cogvideox-5b'" in line
        assert "choose a target with diffusers' names (bf16 with export.layout=diffusers)" in line
    nameless = Path(shutil.copytree(convrot, tmp_path / "nameless"))
    for name, message in (
        ("", "does not say of which family it is"),
        ("../conf/data/clips", "of a family that is not here"),
    ):
        manifest = json.loads((convrot / "manifest.json").read_text())
        manifest["base"]["name"] = name
        (nameless / "manifest.json").write_text(json.dumps(manifest))
        assert export(nameless, tmp_path / "out", "target=comfy") == BAD_INPUT
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line


def test_nothing_is_written_over(convrot: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "diffusion_model.safetensors").write_bytes(b"mine")
    assert export(convrot, out, "target=comfy") == BAD_INPUT
    assert "holds 1 of the 3 files that would be written" in capsys.readouterr().err
    assert (out / "diffusion_model.safetensors").read_bytes() == b"mine"
    assert export(convrot, out, "target=comfy", "overwrite=true") == DONE
    capsys.readouterr()
    assert export(convrot, out, "target=bf16") == BAD_INPUT
    assert "parity.json" in capsys.readouterr().err
    assert export(convrot, convrot, "target=bf16", "overwrite=true") == BAD_INPUT
    assert "is the packed directory itself" in capsys.readouterr().err


def test_damage_and_lost_values_are_refused(convrot: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = Path(shutil.copytree(convrot, tmp_path / "packed"))
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    assert export(copy, tmp_path / "out", "target=comfy") == BAD_INPUT
    assert "has sha256" in capsys.readouterr().err
    model = tiny_wan()
    with torch.no_grad():
        model.proj_out.weight[0, 0] = 1e6  # no float16
    big = save(model, tmp_path / "big", profile="convrot", bits="w4a4")
    assert export(big, tmp_path / "out", "target=comfy", "export.dtype=float16") == BAD_INPUT
    line = capsys.readouterr().err
    assert "'proj_out.weight', float16" in line
    assert "write export.dtype=float32" in line
    assert not (tmp_path / "out").exists()


def test_a_target_is_chosen_and_named(convrot: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, message in (
        ([], "target is missing; write target=NAME"),
        (["target=comfi"], "unknown export=comfi; did you mean 'comfy'?"),
        (["target=comfy", "export.rank=3"], "unknown key 'export.rank'"),
    ):
        assert export(convrot, tmp_path / "out", *words) == BAD_INPUT
        assert message in capsys.readouterr().err


def test_a_class_without_fixed_inputs_is_compared_by_layers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = AllegroTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=32, cross_attention_dim=64,
        num_layers=1, caption_channels=64,
    )  # fmt: skip
    packed = save(model, tmp_path / "packed", profile="svdq_g64", bits="w4a4", name="")
    assert export(packed, tmp_path / "out", "target=cache_dit") == DONE
    content = parity(tmp_path / "out")
    assert content["model"] is None
    assert content["exact"] is True
    assert len(content["layers"]) == 10
    assert "no fixed inputs are known for AllegroTransformer3DModel" in (tmp_path / "out" / "parity.html").read_text()


def test_a_target_of_ones_own(convrot: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_target.py").write_text(
        "from qvgen.deploy.exporters.bf16 import Bf16\n"
        "class Mine(Bf16):\n    runtime = 'my own'\n"
    )  # fmt: skip
    (tmp_path / "conf" / "export").mkdir(parents=True)
    (tmp_path / "conf" / "export" / "mine.yaml").write_text(
        "_target_: my_target.Mine\ndtype: float16\nlayout: diffusers\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert export(convrot, tmp_path / "out", "--config-dir", str(tmp_path / "conf"), "target=mine") == DONE
    assert parity(tmp_path / "out")["runtime"] == "my own"
    assert load_file(tmp_path / "out" / "diffusion_pytorch_model.safetensors")["proj_out.bias"].dtype == torch.float16
