"""Whole runs of further families on tiny folders, from mp4 files to videos of the packed model; plans at full size.

Checked against the fake-quantized model's own videos (PSNR), the run's packed bytes, runs of one process, and the report.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qvgen.cli import main
from qvgen.config.leaves import load_leaf
from tests.verbs.test_further_models import MODELS
from tests.verbs.test_hub_models import check_two_processes, train_keys, write_clips

pytestmark = pytest.mark.filterwarnings("ignore:In CPU autocast")  # Mochi's transformer turns it off, in its own way


@pytest.mark.parametrize("name", MODELS)
def test_from_mp4_files_to_videos_of_the_packed_model(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, sizes = MODELS[name]
    folder = make(tmp_path / "model")
    clips = write_clips(tmp_path / "clips", fps=load_leaf("model", name).fps)
    keys = [*train_keys(name, folder, clips, tmp_path), *sizes]
    assert main(["precompute", *(key for key in keys if key.startswith(("model", "data")))]) == 0
    assert "8 clips ready (8 encoded by this process), 0 unusable" in capsys.readouterr().out
    assert main(["train", *keys, "method.caption_dropout=0.5"]) == 0
    run_dir = tmp_path / "run"
    report = json.loads((run_dir / "report.json").read_text())
    assert (report["model"], report["phi_rank_final"], report["packed_codes_equal"]) == (name, 0, True)
    assert all(0 < report["relative_error"][key] < 2 for key in ("ptq", "qat", "packed"))
    assert float(report["trajectory_psnr_db"]) >= 50
    assert report["quality"]["variants"]["packed"]["psnr_db"] < 99
    (run_dir / "packed").rename(tmp_path / "first")
    assert main(["fold", f"run_dir={run_dir}"]) == 0
    for file in ("model.safetensors", "manifest.json"):
        assert (run_dir / "packed" / file).read_bytes() == (tmp_path / "first" / file).read_bytes()
    capsys.readouterr()
    command = ["generate", f"packed={run_dir / 'packed'}", f"model={name}", f"model.path={folder}", "prompt=a red boat"]
    assert main([*command, *sizes, f"out={tmp_path / 'out'}"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    (of_the_run,) = (run_dir / "videos").glob("*-packed.mp4")
    assert Path(line).read_bytes() == of_the_run.read_bytes()


@pytest.mark.parametrize("name", MODELS)
def test_two_processes_train_the_same(name: str, tmp_path: Path) -> None:
    make, sizes = MODELS[name]
    check_two_processes(name, make(tmp_path / "model"), tmp_path, overrides=sizes)


@pytest.mark.parametrize(("name", "layers"), [("hunyuanvideo", 520), ("hunyuanvideo1.5", 756), ("mochi", 669)])
def test_a_plan_at_full_size_needs_no_weights(name: str, layers: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Mochi and HunyuanVideo 1.5 ask which tokens a caption has: the plan takes all of them."""
    given = [f"model={name}", "bits=4", "devices=8", "strategy=fsdp", "device_memory_gib=80"]
    assert main(["train", *given, "dry_run=true"]) in (0, 3)  # 3 where disk or host memory is short
    plan = capsys.readouterr().out
    assert f"quantized: {layers} Linears" in plan
    assert "PFLOP per sample (teacher" in plan
    assert "DOES NOT FIT" not in plan
