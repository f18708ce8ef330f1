"""Image-to-video models on tiny folders through the verbs, from mp4 files to videos of the packed model, and what is refused.

Checked against the fake-quantized model's own videos (PSNR), the cache's content, runs of one process, and messages.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qvgen.cli import BAD_INPUT, main
from qvgen.config.leaves import load_leaf
from tests.models.further_folders import make_hunyuan15_folder
from tests.models.hub_folders import make_wan_folder
from tests.models.image_folders import make_cogvideox_image_folder, make_wan_image_folder, write_image, write_prompts
from tests.runs import packed_bytes
from tests.verbs.test_hub_models import check_two_processes, tiny_keys, train_keys, write_clips

MODELS: dict[str, tuple[Any, str]] = {
    "wan-i2v-14b": (make_wan_image_folder, "2.1"),
    "cogvideox-i2v": (make_cogvideox_image_folder, "5b"),
    "wan2.2-i2v-a14b": (make_wan_image_folder, "a14b"),
    "cogvideox1.5-i2v": (make_cogvideox_image_folder, "1.5"),
    "wan2.2-i2v-5b": (make_wan_folder, "ti2v"),
    "hunyuanvideo1.5-i2v": (make_hunyuan15_folder, "image"),
}


@pytest.mark.parametrize("name", MODELS)
def test_from_mp4_files_to_videos_of_the_packed_model(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, variant = MODELS[name]
    folder = make(tmp_path / "model", variant)
    clips, prompts = write_clips(tmp_path / "clips", fps=load_leaf("model", name).fps), write_prompts(tmp_path)
    keys = [*train_keys(name, folder, clips, tmp_path), f"evaluation.prompts={prompts}"]
    assert main(["precompute", *(key for key in keys if key.startswith(("model", "data")))]) == 0
    assert "8 clips ready (8 encoded by this process), 0 unusable" in capsys.readouterr().out
    kept = load_file(sorted((tmp_path / "cache" / "latents").rglob("*.safetensors"))[0])
    assert set(kept) == {"latents", "first_frame", "image_latents"} | (
        {"image_embeds"} if name in ("wan-i2v-14b", "hunyuanvideo1.5-i2v") else set()
    )
    assert kept["first_frame"].shape == ((64, 96, 3) if name == "wan2.2-i2v-5b" else (32, 48, 3))
    assert kept["first_frame"].dtype == torch.uint8
    assert main(["train", *keys, "method.caption_dropout=0.5"]) == 0
    run_dir = tmp_path / "run"
    report = json.loads((run_dir / "report.json").read_text())
    assert (report["model"], report["phi_rank_final"], report["packed_codes_equal"]) == (name, 0, True)
    assert all(0 < report["relative_error"][key] < 2 for key in ("ptq", "qat", "packed"))
    assert float(report["trajectory_psnr_db"]) >= 50
    (run_dir / "packed").rename(tmp_path / "first")
    assert main(["fold", f"run_dir={run_dir}"]) == 0
    assert packed_bytes(run_dir) == (tmp_path / "first" / "model.safetensors").read_bytes()
    capsys.readouterr()
    command = ["generate", f"packed={run_dir / 'packed'}", f"model={name}", f"model.path={folder}"]
    assert main([*command, "prompt=a red boat", f"image={tmp_path / 'first.png'}", f"out={tmp_path / 'out'}"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    (of_the_run,) = (run_dir / "videos").glob("*-packed.mp4")
    assert Path(line).read_bytes() == of_the_run.read_bytes()


@pytest.mark.parametrize("name", MODELS)
def test_two_processes_train_the_same(name: str, tmp_path: Path) -> None:
    """Loss and packed bytes of DDP and FSDP are those of one process."""
    make, variant = MODELS[name]
    given = [f"evaluation.prompts={write_prompts(tmp_path)}"]
    check_two_processes(name, make(tmp_path / "model", variant), tmp_path, overrides=given)


def test_ptq_calibrates_on_prompts_with_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Another image in a file of the same name is another calibration."""
    folder, prompts = make_wan_image_folder(tmp_path / "model"), write_prompts(tmp_path)
    keys = [
        "ptq", *tiny_keys("wan-i2v-14b", folder), f"calibration.cache={tmp_path / 'statistics'}", "calibration.videos=1",
        "calibration.steps=2", "evaluation.samples=2", "evaluation.quality_videos=1", "evaluation.videos=0", "bits=w4a8",
        "logger=csv", "init=smoothquant",
    ]  # fmt: skip
    assert main([*keys, f"run_dir={tmp_path / 'refused'}"]) == BAD_INPUT
    (line,) = capsys.readouterr().err.splitlines()
    assert "model=wan-i2v-14b makes a video of a caption and an image, and 'a red boat' has none; write " in line
    assert "evaluation.prompts=FILE.jsonl with lines like" in line
    for run in ("first", "second"):
        assert main([*keys, f"evaluation.prompts={prompts}", f"run_dir={tmp_path / run}"]) == 0
        write_image(tmp_path / "first.png", shade=30)
    assert len([path for path in (tmp_path / "statistics").iterdir() if path.is_dir()]) == 2


def test_a_plan_at_full_size_needs_no_weights(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["model=wan-i2v-14b", "bits=4", "devices=8", "strategy=fsdp", "device_memory_gib=141"]
    assert main(["train", *given, "dry_run=true"]) in (0, 3)  # 3 where disk or host memory is short
    plan = capsys.readouterr().out
    assert "quantized: 486 Linears" in plan
    assert "PFLOP per sample (teacher" in plan
