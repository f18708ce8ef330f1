"""Every verb on complete model folders of the hub's layout, from mp4 files to videos of the packed model.

The folders are the real diffusers and transformers classes at tiny sizes (tests/models/hub_folders.py); the clips are
procedural. Checked against: the fake-quantized model's own videos (PSNR), the cache's content, the report's numbers.
"""

from __future__ import annotations

import atexit
import csv
import json
import shutil
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import LatteTransformer3DModel
from safetensors.torch import load_file

from qvgen.cli import BAD_INPUT, main
from qvgen.config.leaf_file import read_leaf
from qvgen.config.processes import launched_world
from qvgen.data.video import write_video
from qvgen.data.video_reader import read_frames
from tests.models.hub_folders import make_cogvideox_folder, make_wan_folder
from tests.models.ltx_folders import LATTE_TRANSFORMER, make_latte_folder, make_ltx_folder
from tests.runs import UNSEEN, packed_bytes, read_metrics, snapshot

MODELS: dict[str, tuple[Any, str]] = {
    "cogvideox": (make_cogvideox_folder, "2b"),
    "cogvideox-5b": (make_cogvideox_folder, "5b"),
    "cogvideox1.5": (make_cogvideox_folder, "1.5"),
    "wan": (make_wan_folder, "2.1"),
    "wan2.2-a14b": (make_wan_folder, "a14b"),
    "wan2.2-ti2v": (make_wan_folder, "ti2v"),
}
WHOLE_WAY = ("cogvideox", "wan2.2-ti2v")
"""Models that go the whole way here: one of each VAE and objective, and, when asked for (tests/conftest.py), one of a noise
level for each token. Others are in tests/verbs/test_ltx_runs.py; below, cogvideox-5b is trained on clips of two shapes, both
experts of wan2.2-a14b are packed and sampled, and wan is trained by two processes, when asked for. Without clips:
tests/verbs/test_ptq_without_clips.py."""
FEW = (
    "calibration.videos=1", "calibration.steps=2", "evaluation.samples=2", "evaluation.quality_videos=1",
    "evaluation.videos=0", "evaluation.start_videos=false", "logger=csv",
)  # fmt: skip
CAPTIONS = ("a red boat", "two dogs run", "a dog", "a boat", "red dogs", "boats run", "a red dog", "two boats")


def write_clips(folder: Path, *, fps: float) -> Path:
    """Eight clips of 64 x 96 pixels with a moving bright square, and their table; written once in a process."""
    shutil.copytree(_clips_written_once(fps), folder, dirs_exist_ok=True)
    return folder


@cache
def _clips_written_once(fps: float) -> Path:
    folder = Path(tempfile.mkdtemp(prefix="qvgen-tests-clips-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    rows = ["file_name,text"]
    for index, caption in enumerate(CAPTIONS):
        frames = np.full((12, 64, 96, 3), 20 * index, dtype=np.uint8)
        for frame in range(12):
            frames[frame, 8:40, 4 * frame : 4 * frame + 32, index % 3] = 230
        write_video(folder / f"{index}.mp4", frames, fps=fps, scale=1)
        rows.append(f"{index}.mp4,{caption}")
    (folder / "metadata.csv").write_text("\n".join(rows) + "\n")
    return folder


def tiny_keys(name: str, folder: Path) -> list[str]:
    """Overrides that fit a configuration to a tiny folder."""
    height = 64 if name in ("wan2.2-ti2v", "wan2.2-i2v-5b", "ltx", "ltx-13b") else 32
    return [
        f"model={name}", f"model.path={folder}", f"model.height={height}", f"model.width={3 * height // 2}",
        "model.num_frames=9", "model.sampling_frames=9", "model.text_encoder_dtype=float32", "model.dtype=float32",
        "model.num_inference_steps=2", "model.prompts=[a red boat,two dogs run]",
    ]  # fmt: skip


def train_keys(name: str, folder: Path, clips: Path, tmp_path: Path) -> list[str]:
    """A training run of seconds."""
    return [
        *tiny_keys(name, folder), f"data.path={clips}", f"data.cache={tmp_path / 'cache'}", "logger=csv", "bits=4",
        "steps=3", "batch_size=2", "phi.ranks=[2]", "evaluation.samples=3", "evaluation.videos=1",
        "evaluation.quality_videos=1", "evaluation.start_videos=false", "evaluation.video_every_steps=null",
        f"run_dir={tmp_path / 'run'}",
    ]  # fmt: skip


def latent_dates(cache_folder: Path) -> dict[str, int]:
    """When each file of latents was written."""
    return {path.name: path.stat().st_mtime_ns for path in (cache_folder / "latents").rglob("*") if path.is_file()}


def test_tasks_of_slurm_share_out_the_clips(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three tasks for eight clips, one after another; another command finds everything encoded, once."""
    folder, clips = make_wan_folder(tmp_path / "model", "2.1"), write_clips(tmp_path / "clips", fps=16)
    keys = [*tiny_keys("wan", folder), f"data.path={clips}", f"data.cache={tmp_path / 'cache'}"]
    step = {
        "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "3", "SLURM_STEP_NODELIST": "localhost",
        "SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_TASKS_PER_NODE": "3", "SLURM_NODEID": "0",
    }  # fmt: skip
    found = []
    try:
        with monkeypatch.context() as tasks:
            for name, value in step.items():
                tasks.setenv(name, value)
            for rank in (2, 1, 0):
                tasks.setenv("SLURM_PROCID", str(rank))
                tasks.setenv("SLURM_LOCALID", str(rank))
                assert main(["precompute", *keys]) == 0
                found.append(capsys.readouterr().out.splitlines()[0].partition(",")[0])
            assert main(["precompute", *keys, "devices=3"]) == BAD_INPUT
            assert capsys.readouterr().err.startswith("qvgen precompute: devices=3: SLURM started 3 processes")
        assert main(["precompute", *keys]) == 0
    finally:
        launched_world.enter(None)
    assert found == [
        "rank 2 of 3: 2 clips encoded by this process",
        "rank 1 of 3: 3 clips encoded by this process",
        "8 clips ready (3 encoded by this process)",
    ]
    assert "8 clips ready (0 encoded by this process)" in capsys.readouterr().out
    assert len(latent_dates(tmp_path / "cache")) == len(CAPTIONS)


@pytest.mark.parametrize("name", WHOLE_WAY)
def test_from_mp4_files_to_videos_of_the_packed_model(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, variant = MODELS[name]
    check_whole_way(name, make(tmp_path / "model", variant), tmp_path, capsys)


def check_whole_way(
    name: str,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    *,
    clips: Path | None = None,
    overrides: Sequence[str] = (),
) -> None:
    """Clips are encoded once, a run packs what it trained, fold makes the same bytes, and generate the run's own video.

    Args:
        name: Name of the model.
        folder: Its folder.
        tmp_path: Where everything is written.
        capsys: What is printed.
        clips: A folder of eight clips; None: one that is written.
        overrides: Keys behind those of :func:`train_keys`.
    """
    clips = clips or write_clips(tmp_path / "clips", fps=read_leaf("model", name)["fps"])
    keys = [*train_keys(name, folder, clips, tmp_path), *overrides]

    data_keys = [key for key in keys if key.startswith(("model", "data"))]
    assert main(["precompute", *data_keys]) == 0
    assert "8 clips ready (8 encoded by this process), 0 unusable" in capsys.readouterr().out
    dates = latent_dates(tmp_path / "cache")
    assert len(dates) == 8
    assert main(["train", *keys]) == 0
    assert latent_dates(tmp_path / "cache") == dates  # the run encodes no clip again
    run_dir = tmp_path / "run"
    report = json.loads((run_dir / "report.json").read_text())
    assert (report["model"], report["phi_rank_final"], report["packed_codes_equal"]) == (name, 0, True)
    assert len(report["layers_quantized"]) > 20
    error = report["relative_error"]
    assert all(0 < error[key] < 2 for key in ("ptq", "qat", "packed"))

    (run_dir / "packed").rename(tmp_path / "first")
    assert main(["fold", f"run_dir={run_dir}"]) == 0
    for file in ("model.safetensors", "manifest.json"):
        assert (run_dir / "packed" / file).read_bytes() == (tmp_path / "first" / file).read_bytes()

    # The packed pipeline's video is the fake-quantized one's (tests/models compare them directly), and not the teacher's.
    assert float(report["trajectory_psnr_db"]) >= 50
    assert report["quality"]["variants"]["packed"]["psnr_db"] < 99
    # The manifest and model.path are all that is needed to sample the run's own video.
    capsys.readouterr()
    command = ["generate", f"packed={run_dir / 'packed'}", f"model={name}", f"model.path={folder}", "prompt=a red boat"]
    assert main([*command, f"out={tmp_path / 'out'}"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    (of_the_run,) = (run_dir / "videos").glob("*-packed.mp4")
    assert Path(line).read_bytes() == of_the_run.read_bytes()


def check_two_processes(
    name: str, folder: Path, tmp_path: Path, *, clips: Path | None = None, overrides: Sequence[str] = ()
) -> None:
    """Losses and packed bytes of two processes, whole students and shards of one, are those of one process.

    Args:
        name: Name of the model.
        folder: Its folder.
        tmp_path: Where everything is written.
        clips: A folder of eight clips; None: one that is written.
        overrides: Keys behind those of :func:`train_keys`.
    """
    clips = clips or write_clips(tmp_path / "clips", fps=read_leaf("model", name)["fps"])
    keys = [*train_keys(name, folder, clips, tmp_path), *overrides, *UNSEEN, "method.caption_dropout=0.5"]
    keys = [key for key in keys if not key.startswith("run_dir")]
    processes = {"alone": [], "ddp": ["devices=2", "strategy=ddp"], "fsdp": ["devices=2", "strategy=fsdp"]}
    for run, words in processes.items():
        assert main(["train", *keys, *words, f"run_dir={tmp_path / run}"]) == 0
    losses = {run: [row["train/loss"] for row in read_metrics(tmp_path / run)] for run in processes}
    assert len(losses["alone"]) == 3
    assert losses["ddp"] == losses["fsdp"] == losses["alone"]
    assert packed_bytes(tmp_path / "ddp") == packed_bytes(tmp_path / "fsdp") == packed_bytes(tmp_path / "alone")


def test_ltx_starts_from_a_calibrated_method_with_its_folds(tmp_path: Path) -> None:
    folder = make_ltx_folder(tmp_path / "model", "13b")
    keys = [*tiny_keys("ltx-13b", folder), f"calibration.cache={tmp_path}", *FEW, "init=smoothquant", "bits=w4a8"]
    assert main(["ptq", *keys, f"run_dir={tmp_path / 'run'}"]) == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert float(report["trajectory_psnr_db"]) >= 50
    layers = json.loads((tmp_path / "run" / "packed" / "manifest.json").read_text())["layers"]
    assert len(layers) == 27
    tensors = load_file(tmp_path / "run" / "packed" / "model.safetensors").keys()
    smoothed = {name.removesuffix(".input_scale") for name in tensors if name.endswith(".input_scale")}
    assert len(smoothed) == 23
    assert not any(name.endswith("to_out.0") for name in smoothed)


def test_latte_has_the_four_groups_of_vidit_q_with_their_metrics(tmp_path: Path) -> None:
    folder = make_latte_folder(tmp_path / "model")
    torch.manual_seed(0)  # one block of each kind: each unit more is measured eight times
    LatteTransformer3DModel(**{**LATTE_TRANSFORMER, "num_layers": 1}).save_pretrained(folder / "transformer")
    blocks = {"transformer_blocks.0"}
    temporal = {f"temporal_{name}" for name in blocks}
    groups = {
        "self_attention": blocks, "cross_attention": blocks, "temporal_attention": temporal, "ffn": blocks | temporal,
        "other": {"caption_projection", "adaln_single", "proj_out"},
    }  # fmt: skip
    check_groups_of_vidit_q("latte", folder, tmp_path, groups)


def check_groups_of_vidit_q(
    name: str, folder: Path, tmp_path: Path, groups: dict[str, set[str]], *, overrides: Sequence[str] = ()
) -> None:
    """Every block of each group is measured by the group's own metric, and the bits that are chosen are packed."""
    metrics = ("init.visual=ssim", "init.motion=differences", "init.videos=1", "init.steps=1", "init.windows=1")
    keys = [
        *tiny_keys(name, folder),
        f"calibration.cache={tmp_path}",
        *FEW,
        "init=vidit_q_mp",
        *metrics,
        *overrides,
        "bits=w4a8",
    ]
    assert main(["ptq", *keys, "init.candidates=[4,8]", f"run_dir={tmp_path / 'run'}"]) == 0
    with (tmp_path / "run" / "mixed_precision" / "sensitivity.csv").open() as table:
        rows = list(csv.DictReader(table))
    found: dict[str, set[str]] = {}
    for row in rows:
        found.setdefault(row["group"], set()).add(row["block"])
    assert found == groups
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    wanted = {
        "cross_attention": "attention output", "temporal_attention": "differences", "self_attention": "ssim", "ffn": "ssim",
        "other": "output error",
    }  # fmt: skip
    assert report["mixed_precision"]["metrics"] == {group: wanted[group] for group in groups}
    assert float(report["trajectory_psnr_db"]) >= 50


def test_two_packed_experts_sample_in_one_pipeline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_wan_folder(tmp_path / "model", "a14b")
    clips = write_clips(tmp_path / "clips", fps=16)
    keys = [key for key in train_keys("wan2.2-a14b", folder, clips, tmp_path) if not key.startswith("run_dir")]
    # The high one is trained when asked (tests/verbs/test_ltx_runs.py).
    low = [*keys, "model.expert=low", f"run_dir={tmp_path / 'low'}", "evaluation.videos=0"]
    assert main(["train", *low]) == 0
    quick = [*tiny_keys("wan2.2-a14b", folder), "init=rtn", "bits=4", "logger=csv", "evaluation.samples=0"]
    assert main(["ptq", *quick, "model.expert=high", f"run_dir={tmp_path / 'high'}"]) == 0
    packed = {expert: tmp_path / expert / "packed" for expert in ("high", "low")}
    capsys.readouterr()
    command = ["generate", *tiny_keys("wan2.2-a14b", folder), "prompt=a dog", "num_steps=3"]
    videos = {}
    for name, directories in {
        "both": f"[{packed['high']},{packed['low']}]",
        "swapped": f"[{packed['low']},{packed['high']}]",
        "high": str(packed["high"]),
        "none": "null",
    }.items():
        assert main([*command, f"packed={directories}", f"out={tmp_path / name}"]) == 0
        videos[name] = read_frames(Path(capsys.readouterr().out.strip()), lambda info: range(info.num_frames))[1]
    assert np.array_equal(videos["both"], videos["swapped"])
    assert not np.array_equal(videos["both"], videos["high"])
    assert not np.array_equal(videos["high"], videos["none"])
    assert main([*command, f"packed=[{packed['high']},{packed['high']}]", f"out={tmp_path / 'bad'}"]) == 2
    assert "give one high and one low" in capsys.readouterr().err
    assert main([*command, f"packed={packed['high']}", "model.path=null", f"out={tmp_path / 'bad'}"]) == 2
    assert "hf download Wan-AI/Wan2.2-T2V-A14B-Diffusers" in capsys.readouterr().err


def test_two_processes_share_the_clips_and_train_the_same(tmp_path: Path) -> None:
    folder = make_wan_folder(tmp_path / "model")
    clips = write_clips(tmp_path / "clips", fps=16)
    keys = [*train_keys("wan", folder, clips, tmp_path), "method.caption_dropout=0.5"]
    # Of two prompts, one for each process, after steps 0 and 3.
    videos = ["evaluation.videos=2", "evaluation.video_every_steps=3", "model.num_inference_steps=1"]
    assert main(["train", *keys, *videos, "devices=2", "strategy=ddp"]) == 0
    for step in (0, 3):
        folder_of_step = tmp_path / "run" / "validation" / f"step-{step:06d}"
        assert len(list(folder_of_step.glob("*-student.mp4"))) == 2
    assert "While training" in (tmp_path / "run" / "report.html").read_text()
    validation = json.loads((tmp_path / "run" / "report.json").read_text())["validation"]
    assert [row["step"] for row in validation] == [0, 0, 3, 3]
    logs = tmp_path / "cache" / "logs"
    assert (logs / "rank1.log").is_file()
    first = snapshot(tmp_path / "cache" / "latents") | snapshot(tmp_path / "cache" / "texts")
    assert (
        len(first) == 8 + 8 + 1 + 1
    )  # latents, captions (the prompts are two of them), the empty one, the negative prompt
    # One process without videos: the same latents, losses and packed weights.
    alone = [key for key in keys if not key.startswith(("run_dir", "data.cache"))]
    assert main(["train", *alone, *UNSEEN, f"run_dir={tmp_path / 'alone'}", f"data.cache={tmp_path / 'other'}"]) == 0
    assert snapshot(tmp_path / "other" / "latents") | snapshot(tmp_path / "other" / "texts") == first
    losses = [[row["train/loss"] for row in read_metrics(tmp_path / name)] for name in ("run", "alone")]
    assert losses[0] == losses[1]
    assert packed_bytes(tmp_path / "run") == packed_bytes(tmp_path / "alone")


def test_clips_of_two_shapes_and_bad_ones(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_cogvideox_folder(tmp_path / "model", "5b")
    clips = write_clips(tmp_path / "clips", fps=8)
    for index in range(4):
        frames = np.full((12, 96, 64, 3), 30 * index, dtype=np.uint8)
        write_video(clips / f"tall{index}.mp4", frames, fps=8, scale=1)
    write_video(clips / "short.mp4", np.zeros((3, 64, 96, 3), dtype=np.uint8), fps=8, scale=1)
    rows = [*(f"tall{index}.mp4,a tall boat" for index in range(4)), "short.mp4,a boat", "gone.mp4,a boat"]
    with (clips / "metadata.csv").open("a") as table:
        table.write("\n".join(rows) + "\n")
    keys = [
        *train_keys("cogvideox-5b", folder, clips, tmp_path),
        "data.buckets=[9x32x48,9x48x32]",
        "evaluation.videos=0",
    ]
    assert main(["train", *keys]) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert "1 of 14 clips can't be used, more than max_bad=0.05" in message  # no need to look at the rest
    assert main(["train", *keys, "data.max_bad=0.2"]) == 0
    (report,) = (tmp_path / "cache" / "indexes").glob("*.bad.csv")
    names = [line.split(",")[0] for line in report.read_text().splitlines()]
    assert names == ["file_name", "gone.mp4", "short.mp4"]


def test_without_weights_it_says_what_to_download(capsys: pytest.CaptureFixture[str]) -> None:
    for verb, names in (("precompute", ("cogvideox1.5", "wan2.2-ti2v")), ("train", ("cogvideox", "wan2.2-a14b"))):
        for name in names:
            assert main([verb, f"model={name}", "data.path=clips"]) == 2
            (line,) = capsys.readouterr().err.splitlines()
            repository = read_leaf("model", name)["repository"]
            assert f"hf download {repository} --local-dir FOLDER` and write model={name} model.path=FOLDER" in line
