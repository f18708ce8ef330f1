"""A file that hangs or crashes its decoder costs one worker and is named; checked with real hangs and crashes.

Optional: a real file on which other decoders hang for ever, from the package `perception`.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from qvgen.data.assets import find_asset
from qvgen.data.clip_process import ClipReader, TimedOut
from qvgen.data.clips import BadClip, Bucket, CutSettings, cut_clip
from qvgen.data.video_reader import probe_video
from tests.data.video_files import write_clip

SETTINGS = CutSettings(fps=8, buckets=(Bucket(frames=5, height=32, width=48),))
FAILING = "tests.data.failing_worker:answer"


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_the_worker_reads_what_this_process_reads(tmp_path: Path) -> None:
    first = write_clip(tmp_path / "first.mp4", 20)
    second = write_clip(tmp_path / "second.mp4", 33, fps=24, height=64, width=48)
    with ClipReader() as reader:
        for path in (first, second, first):
            assert reader.probe(path) == probe_video(path)
            cut, frames = reader.cut(path, settings=SETTINGS)
            expected_cut, expected = cut_clip(path, settings=SETTINGS)
            assert cut == expected_cut
            np.testing.assert_array_equal(frames, expected)


def test_bad_files_are_refused_with_the_reason_and_the_worker_stays(tmp_path: Path) -> None:
    short, text = write_clip(tmp_path / "short.mp4", 3), tmp_path / "text.mp4"
    text.write_text("no video " * 100)
    with ClipReader(answer=FAILING) as reader:
        pid = reader.ask({"path": "pid"})[0]["pid"]
        for path, reason in (
            (short, "too short"),
            (text, r"text\.mp4 holds no frame"),
            (tmp_path / "x", "no video file"),
        ):
            with pytest.raises(BadClip, match=reason):
                reader.cut(path, settings=SETTINGS)
        assert reader.ask({"path": "pid"})[0]["pid"] == pid
    assert not is_alive(pid)


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("sleeps", TimedOut, "not read within 0.5 s; its decoder hangs"),  # ended by its own alarm
        ("holds_the_lock", TimedOut, "not read within 0.5 s; its decoder hangs"),
        ("crashes", BadClip, "ended by SIGSEGV"),
        ("a_bug", RuntimeError, "KeyError: 'a bug'"),
    ],
)
def test_why_a_worker_was_lost_is_told(name: str, error: type[Exception], message: str) -> None:
    with ClipReader(timeout_s=0.5, answer=FAILING) as reader, pytest.raises(error, match=message):
        reader.probe(name)


def test_a_lost_worker_costs_one_file(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "good.mp4", 20)
    with ClipReader(timeout_s=30, answer=FAILING) as reader:
        with pytest.raises(BadClip, match="SIGSEGV"):
            reader.probe("crashes")
        assert reader.probe(path).num_frames == 20  # by the next worker


def test_a_hanging_worker_does_not_outlive_a_killed_parent() -> None:
    program = (
        "from qvgen.data.clip_process import ClipReader\n"
        f"reader = ClipReader(timeout_s=1.0, answer={FAILING!r})\n"
        "print(reader.ask({'path': 'pid'})[0]['pid'], flush=True)\n"
        "reader.ask({'path': 'sleeps'})\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, env=environment) as parent:
        assert parent.stdout is not None
        worker = int(parent.stdout.readline())
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    deadline = time.monotonic() + 10
    while is_alive(worker) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_alive(worker)


def test_a_worker_that_can_not_start_says_why() -> None:
    with ClipReader(answer="tests.data.absent:answer") as reader:
        for _ in range(2):
            with pytest.raises(RuntimeError, match="No module named 'tests.data.absent'"):
                reader.probe("any")


def test_a_time_limit_must_be_positive() -> None:
    with pytest.raises(ValueError, match="timeout_s=0"):
        ClipReader(timeout_s=0)


def test_a_real_file_on_which_other_decoders_hang() -> None:
    folder = find_asset("perception")
    if folder is None:
        pytest.skip("the package perception was not fetched; run: qvgen assets names=perception")
    path = next(folder.rglob("v2s.mov"))
    with ClipReader() as reader:
        info = reader.probe(path)  # whose container shows 79 frames
        settings = CutSettings(fps=float(info.fps), buckets=(Bucket(frames=79, height=180, width=320),))
        assert info.num_frames == 79
        assert reader.cut(path, settings=settings)[1].shape == (79, 180, 320, 3)
