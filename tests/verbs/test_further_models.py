"""Every verb on complete tiny folders of further families: from mp4 files to videos of the packed model, and plans.

Checked against the fake-quantized model's own videos (PSNR), the run's packed bytes, and the report's numbers.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qvgen.cli import main
from qvgen.config.leaves import load_leaf
from tests.models.further_folders import make_hunyuan_folder, make_mochi_folder
from tests.verbs.test_hub_models import tiny_keys, train_keys, write_clips

MODELS: dict[str, tuple[Any, list[str]]] = {
    "hunyuanvideo": (make_hunyuan_folder, ["model.vae_dtype=float32"]),
    "mochi": (make_mochi_folder, ["model.num_frames=7", "model.sampling_frames=7"]),
}
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


@pytest.mark.parametrize("init", ["rtn", "dvd_quant"])
@pytest.mark.parametrize("name", MODELS)
def test_ptq_needs_prompts_alone(name: str, init: str, tmp_path: Path) -> None:
    make, sizes = MODELS[name]
    folder, run_dir = make(tmp_path / "model"), tmp_path / "run"
    given = [
        *tiny_keys(name, folder), *sizes, "logger=csv", "bits=4", f"init={init}", "evaluation.samples=4",
        "evaluation.videos=0", "evaluation.quality_videos=1", f"run_dir={run_dir}",
    ]  # fmt: skip
    assert main(["ptq", *given]) == 0
    report = json.loads((run_dir / "report.json").read_text())
    assert 0 < report["relative_error"]["ptq"] < 1
    assert report["packed_codes_equal"] is True


@pytest.mark.parametrize("name", MODELS)
def test_a_plan_at_full_size_needs_no_weights(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(
        ["train", f"model={name}", "data.path=clips", "bits=4", "dry_run=true", "devices=8", "strategy=fsdp"]
    ) in (0, 3)
    plan = capsys.readouterr().out
    assert "DOES NOT FIT" not in plan


@pytest.mark.parametrize("name", MODELS)
def test_without_weights_it_says_what_to_download(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["precompute", f"model={name}", "data.path=clips"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    repository = load_leaf("model", name).repository
    assert f"hf download {repository} --local-dir FOLDER` and write model={name} model.path=FOLDER" in line
