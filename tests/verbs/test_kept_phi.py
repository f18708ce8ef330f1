"""phi.keep=true from the command to other runtimes: training, a stop, resuming, folding, loading, exporting, the records."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file

import qvgen
from qvgen.cli import BAD_INPUT, DONE, main
from qvgen.deploy.exporters.plain_weight import plain_weight
from qvgen.deploy.exporters.svdq_tiles import unpack_down, unpack_up
from qvgen.deploy.fixed_inputs import fixed_inputs
from qvgen.layers.swap import folded_copy, packed_layers, quantized_layers
from qvgen.training.callbacks.rules import first_end
from qvgen.verbs._parts import run_label, student_design
from tests.deploy.exporters.packed_models import svdquant, tiny_wan
from tests.runs import UNSEEN, copy_until, method_schedule, packed_bytes, read_metrics, shallow, train, train_config

WORDS = ("profile=svdq_g64", "bits=w4a4", "phi.keep=true", "phi.rank=4", "phi.keep_rank=2")
RUN = (*WORDS, "steps=5", "phi.tail_share=0.4", "checkpoint.every_steps=2", "checkpoint.keep=9", *UNSEEN)


@pytest.fixture(scope="module")
def kept_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rank 4, then 2 for the last two of five steps."""
    run_dir = tmp_path_factory.mktemp("kept") / "run"
    assert train(run_dir, *RUN, *shallow(1)) == DONE
    return run_dir


@pytest.fixture(scope="module")
def packed_wan(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.nn.Module]:
    """A packed folder with a kept Phi of rank 3, and the fake-quantized model that it was made of."""
    model = tiny_wan()
    options = qvgen.PrepareOptions(phi_rank=3, phi_keep=True)
    qvgen.prepare(model, bits="w4a4", profile="svdq_g64", init="rtn", options=options)
    folder = tmp_path_factory.mktemp("wan") / "packed"
    qvgen.save_packed(folded_copy(model), folder, base_name="wan")
    return folder, model


def output(model: Any) -> torch.Tensor:
    inputs = fixed_inputs(model, timestep=500.0)
    assert inputs is not None
    with torch.no_grad():
        result: torch.Tensor = model(**inputs, return_dict=False)[0]
    return result


def test_the_run_says_what_stays(kept_run: Path) -> None:
    report = json.loads((kept_run / "report.json").read_text())
    assert (report["phi_rank_final"], report["phi_kept"], report["packed_codes_equal"]) == (2, True, True)
    assert float(report["trajectory_psnr_db"]) >= 50
    assert report["relative_error"]["packed"] == pytest.approx(report["relative_error"]["qat"], rel=1e-2)
    page = (kept_run / "report.html").read_text()
    assert "Phi is kept" in page
    assert "Phi is gone" not in page
    manifest = json.loads((kept_run / "packed" / "manifest.json").read_text())
    assert manifest["training"]["phi_kept_rank"] == 2
    assert {layer["branch_rank"] for layer in manifest["layers"]} == {2}
    assert [row["phi/rank"] for row in read_metrics(kept_run)] == ["4", "4", "4", "2", "2"]
    label = run_label(train_config(*WORDS))
    assert " phi kept 2 " in label.name
    assert "phi kept" in label.tags
    assert "phi kept" not in run_label(train_config()).tags


def test_a_stopped_run_keeps_what_phi_is(kept_run: Path, tmp_path: Path) -> None:
    """After two steps, in the middle of a phase: all four columns, two of them behind the gate of that step."""
    run_dir = copy_until(kept_run, tmp_path / "run", step=2)
    assert main(["fold", f"run_dir={run_dir}"]) == DONE
    manifest = json.loads((run_dir / "packed" / "manifest.json").read_text())
    assert {layer["branch_rank"] for layer in manifest["layers"]} == {4}
    assert (manifest["training"]["steps"], manifest["training"]["phi_kept_rank"]) == (2, 4)
    tensors = load_file(run_dir / "packed" / "model.safetensors")
    up = next(value.float() for name, value in tensors.items() if name.endswith("branch_up"))
    assert up.shape[1] == 4


def test_folding_by_layers_leaves_a_phi_whose_rank_is_reached_as_it_is(kept_run: Path, tmp_path: Path) -> None:
    """A layer that does not know its rank would decompose Phi once more, to other bits."""
    assert main(["fold", f"run_dir={kept_run}", f"out={tmp_path / 'folded'}"]) == DONE
    for name in ("model.safetensors", "manifest.json"):
        assert (tmp_path / "folded" / name).read_bytes() == (kept_run / "packed" / name).read_bytes()


def test_a_stopped_run_goes_on_to_the_same_bits(kept_run: Path, tmp_path: Path) -> None:
    run_dir = copy_until(kept_run, tmp_path / "run", step=2)
    assert train(run_dir, *RUN, *shallow(1), "resume=true") == DONE
    assert packed_bytes(run_dir) == packed_bytes(kept_run)


def test_keeping_is_decided_before_training(kept_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = copy_until(kept_run, tmp_path / "run", step=2)
    assert train(run_dir, *RUN, *shallow(1), "resume=true", "phi.keep=false") == BAD_INPUT
    assert "phi.keep" in capsys.readouterr().err


def test_a_run_that_keeps_phi_may_end_at_any_step() -> None:
    config = train_config(*RUN)
    design, schedule = student_design(config), method_schedule(config)
    assert (design.phi_rank, design.phi_kept_rank, schedule.phases) == (4, 2, ((4, 0), (2, 3)))
    assert first_end(schedule, num_steps=5, min_steps=None, phi_keep=design.phi_keep) == 0
    assert first_end(schedule, num_steps=5, min_steps=4, phi_keep=True) == 4
    plain = student_design(train_config("method=lsq", "phi.keep=true"))
    assert (plain.phi_rank, plain.phi_keep) == (0, False)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((*WORDS[2:], "profile=convrot", "bits=4"), "phi.keep=true adds a low-rank branch, which that does not have"),
        (
            ("phi.keep=true", "phi.keep_rank=0"),
            "phi.keep_rank=0 must be greater than 0; write for example phi.keep_rank=16",
        ),
    ],
)
def test_what_can_not_be_kept_is_refused(
    words: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(tmp_path / "run", *words) == BAD_INPUT
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert "choose profile=" in line or "convrot" not in words[-2]


def test_it_loads_bit_equal(packed_wan: tuple[Path, torch.nn.Module]) -> None:
    folder, fake = packed_wan
    assert {layer.phi.rank for layer in quantized_layers(fake).values() if layer.phi} == {3}
    packed = qvgen.load_packed(folder, kernel="reference")
    loaded = WanTransformer3DModel.from_pretrained(folder)
    for name, layer in packed_layers(packed).items():
        other = loaded.get_submodule(name)
        for key, value in layer.state_dict().items():
            assert torch.equal(value, other.state_dict()[key]), (name, key)
        assert layer.form.branch_rank == 3
    wanted = output(fake)
    # Scales of groups can't leave the sum: training dequantizes before it.
    assert (output(packed) - wanted).norm() < 1e-6 * wanted.norm()
    assert (output(loaded) - output(packed)).norm() < 1e-6 * wanted.norm()


@pytest.mark.parametrize(("target", "words"), [("cache_dit", ["export.rank=16"]), ("nunchaku_lite", [])])
def test_the_runtimes_with_a_branch_get_it_padded(
    target: str, words: list[str], packed_wan: tuple[Path, torch.nn.Module], tmp_path: Path
) -> None:
    folder, _ = packed_wan
    out = tmp_path / "out"
    assert main(["export", f"packed={folder}", f"target={target}", f"out={out}", *words]) == DONE
    layer = packed_layers(qvgen.load_packed(folder, kernel="reference"))["blocks.0.ffn.net.0.proj"]
    file = out / ("svdq/svdq_int4_r16.safetensors" if target == "cache_dit" else "diffusion_pytorch_model.safetensors")
    tensors = load_file(file)
    down = unpack_down(tensors["blocks.0.ffn.net.0.proj.proj_down"])
    up = unpack_up(tensors["blocks.0.ffn.net.0.proj.proj_up"])
    assert (down.shape, up.shape) == ((16, 128), (256, 16))
    assert torch.equal(down[:3], layer.branch_down)
    assert torch.equal(up[:, :3], layer.branch_up)
    assert not down[3:].any()
    assert not up[:, 3:].any()
    parity = json.loads((out / "parity.json").read_text())
    assert {layer["runs_as"] for layer in parity["layers"]} == {"w4a4"}
    assert parity["model_arithmetic"]["relative_error"] < 1e-10  # float32 sums of a padded branch
    assert parity["source"]["training"] == {}


def test_dequantized_weights_have_it_inside(packed_wan: tuple[Path, torch.nn.Module], tmp_path: Path) -> None:
    folder, fake = packed_wan
    out = tmp_path / "out"
    assert main(["export", f"packed={folder}", "target=bf16", f"out={out}", "export.dtype=float32"]) == DONE
    model = WanTransformer3DModel.from_pretrained(out)
    layers = packed_layers(qvgen.load_packed(folder, kernel="reference"))
    for name, layer in quantized_layers(fake).items():
        weight = model.get_submodule(name).weight
        assert torch.equal(weight, plain_weight(layers[name]))
        kept = layer.effective_weight() - layer.quantized_weight()
        assert (weight - layer.effective_weight()).norm() < 0.01 * kept.norm()  # its factors are rounded to bfloat16


@pytest.mark.parametrize("target", ["comfy", "int8"])
def test_runtimes_without_a_branch_refuse_it(
    target: str, packed_wan: tuple[Path, torch.nn.Module], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = packed_wan
    assert main(["export", f"packed={folder}", f"target={target}", f"out={tmp_path / 'out'}"]) == BAD_INPUT
    (line,) = capsys.readouterr().err.splitlines()
    assert "a low-rank branch" in line
    assert "choose target=" in line
    assert not (tmp_path / "out").exists()


def test_both_branches_are_one_in_the_export(tmp_path: Path) -> None:
    model = tiny_wan()

    def calibrate(full: torch.nn.Module) -> object:
        return full(**(fixed_inputs(full, timestep=500.0) or {}))

    options = qvgen.PrepareOptions(phi_rank=3, phi_keep=True)
    qvgen.prepare(model, bits="w4a4", profile="svdq_g64", init=svdquant(4), options=options, calibrate=calibrate)
    qvgen.fold(model)
    qvgen.save_packed(model, tmp_path / "packed", base_name="wan")
    assert {layer.form.branch_rank for layer in packed_layers(model).values()} == {7}
    words = [f"packed={tmp_path / 'packed'}", "target=cache_dit", f"out={tmp_path / 'out'}"]
    assert main(["export", *words, "export.rank=16"]) == DONE
    tensors = load_file(tmp_path / "out" / "svdq" / "svdq_int4_r16.safetensors")
    layer = packed_layers(model)["blocks.0.attn1.to_q"]
    assert torch.equal(unpack_down(tensors["blocks.0.attn1.to_q.proj_down"])[:7], layer.branch_down)
