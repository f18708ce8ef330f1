"""An evaluation whose process is killed again and again, wherever it is, leaves the bytes of one that nobody touched.

Where it is killed is drawn at random: after some further video was measured, and a part of a moment later.
QVGEN_LONG_TESTS=1 asks for 200 videos and ten kills.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from qvgen.cli import DONE, main
from qvgen.data.video import write_video

FILES = ("evaluation.json", "evaluation.html", "evaluation.md", "evaluation.tex", "evaluation.csv")
LONG = pytest.mark.skipif(os.environ.get("QVGEN_LONG_TESTS") != "1", reason="minutes: QVGEN_LONG_TESTS=1 asks for it")


def write_folders(folder: Path, count: int) -> list[str]:
    """Videos of two frames and what they are measured beside; the words that name them."""
    drawn = np.random.default_rng(3).integers(0, 256, (count, 2, 16, 16, 3), dtype=np.uint8)
    for name, shift in (("mine", 9), ("theirs", 0)):
        for index, frames in enumerate(drawn):
            write_video(folder / name / f"{index:03d}.mp4", frames // 2 + shift, fps=8, scale=1)
    return [f"videos={folder / 'mine'}", f"reference={folder / 'theirs'}"]


@pytest.mark.parametrize(("count", "kills"), [(6, 1), pytest.param(200, 10, marks=LONG)])
def test_a_killed_evaluation_equals_an_uninterrupted_one(
    count: int, kills: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["evaluate", *write_folders(tmp_path, count), "suite.metrics=[psnr,ssim,temporal_flickering]"]
    assert main([*words, f"out={tmp_path / 'whole'}"]) == DONE
    whole, out, points = tmp_path / "whole", tmp_path / "out", random.Random(7)
    command = [sys.executable, "-m", "qvgen.cli", *words, f"out={out}"]
    measured = out / "measured" / "videos"
    for left in range(kills, 0, -1):
        there = len([*measured.glob("*.json")]) if measured.is_dir() else 0
        wanted = there + points.randint(1, max(1, (count - there) // left - 1))
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
            while not measured.is_dir() or len([*measured.glob("*.json")]) < wanted:
                assert process.poll() is None, "it ended before it was killed"
                time.sleep(0.002)
            time.sleep(points.uniform(0, 0.01))
            process.kill()
            assert process.wait() == -signal.SIGKILL
        assert not (out / "evaluation.json").exists()
    assert subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode == DONE
    assert {name: (out / name).read_bytes() for name in FILES} == {name: (whole / name).read_bytes() for name in FILES}
    capfd.readouterr()
