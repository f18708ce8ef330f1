"""The PTQ start's videos in a run's report: the very state that training started from, and nothing else changes for them."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qvgen.cli import DONE
from qvgen.data.video import write_video
from qvgen.data.video_reader import read_video
from qvgen.evaluation.comparison import START, sample_start
from qvgen.evaluation.item_queue import OneProcess
from qvgen.evaluation.kept_samples import KeptSamples
from qvgen.evaluation.prompts import shown_videos
from qvgen.evaluation.sampling import generate_videos
from qvgen.evaluation.shared_sampling import Asked, SharedSampling
from qvgen.layers.swap import phi_suspended
from qvgen.training.start.file import load_start
from qvgen.verbs._sampling import at_start
from tests.parts import prepared
from tests.runs import STEPS, copy_until, packed_bytes, train, train_config

SAME = ("relative_error", "packed_codes_equal", "trajectory_psnr_db", "flipped_pixels", "flipped_codes", "bytes")


def report_of(run_dir: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((run_dir / "report.json").read_text(encoding="utf-8"))
    return report


def test_they_are_what_the_stored_start_samples(short_run: Path, tmp_path: Path) -> None:
    config = train_config()
    student, _ = prepared(config)
    load_start(student, short_run)
    [shown] = shown_videos(config.evaluation, config.model, seed=config.seed)
    with phi_suspended(student):
        video = generate_videos(config.model, student, [shown.caption], [shown.seed])[0].numpy()
    [found] = (short_run / "videos").glob(f"*-{START}.mp4")
    expected = write_video(tmp_path / "expected.mp4", video, fps=config.model.fps)
    assert np.array_equal(read_video(found), read_video(expected))
    [trained] = (short_run / "videos").glob("*-fake-quantized.mp4")
    assert not np.array_equal(read_video(found), read_video(trained))
    quality = report_of(short_run)["quality"]
    assert quality["start_absent"] is None
    assert quality["variants"][START]["psnr_db"] != quality["variants"]["packed"]["psnr_db"]
    assert report_of(short_run)["sampling"]["variants"]["packed"]["kernels"]


def test_nothing_else_changes_for_them(short_run: Path, tmp_path: Path) -> None:
    without = copy_until(short_run, tmp_path / "run", step=STEPS)
    config = without / "config.yaml"
    config.write_text(config.read_text().replace("start_videos: true", "start_videos: false"))
    overrides = ("accumulate=2", "checkpoint.every_steps=3", "checkpoint.keep=9")
    assert train(without, *overrides, "evaluation.start_videos=false", "resume=true") == DONE
    assert packed_bytes(without) == packed_bytes(short_run)
    one, other = report_of(without), report_of(short_run)
    assert {key: one[key] for key in SAME} == {key: other[key] for key in SAME}
    assert one["quality"]["start_absent"] == "evaluation.start_videos=false"
    del other["quality"]["variants"][START]
    assert one["quality"]["variants"] == other["quality"]["variants"]
    assert "No videos of the PTQ start: evaluation.start_videos=false." in (without / "report.html").read_text()


def test_a_start_that_cannot_be_read_costs_its_videos_alone(
    short_run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run_dir = Path(shutil.copytree(short_run, tmp_path / "run", ignore=shutil.ignore_patterns("videos", "packed")))
    (run_dir / "start.safetensors").write_bytes(b"")
    config = train_config()
    student, _ = prepared(config)

    shown = shown_videos(config.evaluation, config.model, seed=config.seed)
    asked = Asked(family=config.model, encode=config.model.encode, shown=shown, items=[], seeds=[])
    sampling = SharedSampling(asked, kept=KeptSamples(run_dir, key="0"), queue=OneProcess())
    absent, found = sample_start(sampling, partial(at_start, config, student, run_dir), absent=None)
    assert found is None
    assert "start.safetensors" in str(absent)
    assert "start.safetensors" in caplog.text


def test_the_command_that_runs_it_again_is_what_was_typed(short_run: Path) -> None:
    command = report_of(short_run)["command"]
    assert command.startswith("qvgen train logger=csv steps=12 batch_size=4")
    assert command.endswith("accumulate=2 checkpoint.every_steps=3 checkpoint.keep=9")
    assert "run_dir" not in command  # it would be refused: the folder holds this run
