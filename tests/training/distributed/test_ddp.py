"""Two processes train what one trains: the contract asks for 1e-5, the design of a step gives the same bits."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qvgen.cli import BAD_INPUT, DONE, INTERRUPTED
from qvgen.config.run_config import read_config
from qvgen.verbs._parts import step_batch
from tests.runs import SHORT, WATCHED, copy_until, packed_bytes, read_metrics, shallow, train, train_config
from tests.training.validated import contents

RELATIVE = 1e-5
UNWATCHED = ("devices=2",)
"""Of a CPU, whose processes train with ddp unless another strategy is written."""
TWO = (*UNWATCHED, *WATCHED)
STEPS = 5
OPTIONS = (
    f"steps={STEPS}",
    "phi.rank=2",
    "checkpoint.every_steps=3",
    "checkpoint.keep=9",
    "evaluation.every_steps=3",
    "evaluation.quality_videos=1",
    "evaluation.start_videos=false",
    "evaluation.videos=2",
    f"evaluation.video_every_steps={STEPS}",
    *shallow(1),
)
LEFTOVER = {"LOCAL_RANK": "1", "RANK": "1", "WORLD_SIZE": "7", "MASTER_PORT": "1", "MASTER_ADDR": "10.255.255.1"}
"""Of a launcher that is gone."""
BOUNDARIES = (2, 4)
"""First steps of rank 1 and the tail."""


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same command on one process and on two, with validation videos."""
    folder = tmp_path_factory.mktemp("ddp")
    assert train(folder / "one", *OPTIONS) == DONE
    assert train(folder / "two", *OPTIONS, *TWO) == DONE
    return folder / "one", folder / "two"


def test_two_processes_have_the_losses_of_one(both: tuple[Path, Path]) -> None:
    one, two = (read_metrics(run_dir) for run_dir in both)
    assert read_config(both[1])["strategy"]["name"] == "ddp"
    assert read_config(both[0])["strategy"]["name"] == "single"
    assert len(one) == len(two) == STEPS
    assert [int(two[step]["phi/rank"]) for step in BOUNDARIES] == [1, 0]
    for left, right in zip(one, two, strict=True):
        for name in ("train/loss", "train/gradient_norm"):
            assert float(right[name]) == pytest.approx(float(left[name]), rel=RELATIVE)
        for name in ("step", "train/learning_rate", "phi/rank", "phi/gamma_min"):
            assert right[name] == left[name]


def test_two_processes_pack_the_same_bytes(both: tuple[Path, Path]) -> None:
    """Lightning's callbacks and a logger of it look at the second run."""
    assert packed_bytes(both[0]) == packed_bytes(both[1])
    with (both[1] / "file" / "version_0" / "metrics.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    measured = [row["val/relative_error"] for row in read_metrics(both[0]) if row["val/relative_error"]]
    assert [float(row["val/relative_error"]) for row in rows if row["val/relative_error"]] == [*map(float, measured)]
    assert {"train/loss", "lr-AdamW/weights"} <= rows[0].keys()


def test_two_processes_make_the_validation_videos_of_one(both: tuple[Path, Path]) -> None:
    one, two = (contents(run_dir / "validation") for run_dir in both)
    assert len([name for name in one if name.endswith("student.mp4")]) == 2 * len((0, STEPS))
    assert one == two
    assert "validation prompts 1" in (both[1] / "logs" / "rank1.log").read_text()


def test_two_processes_make_the_videos_of_the_end_of_one(both: tuple[Path, Path]) -> None:
    """Which process samples which batch is left to chance; none is sampled twice."""
    one, two = (contents(run_dir / "videos") for run_dir in both)
    assert len(one) == 2 * len(("teacher", "fake-quantized", "packed"))
    assert one == two
    sampled = re.findall(r"sampled (\S+, \w+ \d+ to \d+)", (both[1] / "logs" / "rank1.log").read_text())
    assert len(set(sampled)) == len(sampled)
    for run_dir, said in zip(both, ("after the shown ones", "by 2 processes at once"), strict=True):
        assert said in json.loads((run_dir / "report.json").read_text())["sampling"]["conditions"]


def test_two_processes_continue_where_they_were_whatever_ranks_the_environment_holds(
    both: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in LEFTOVER.items():
        monkeypatch.setenv(name, value)
    run_dir = copy_until(both[1], tmp_path / "run", step=3)
    assert train(run_dir, *OPTIONS, *TWO, "resume=true") == DONE
    assert packed_bytes(run_dir) == packed_bytes(both[1])
    assert read_metrics(run_dir) == read_metrics(both[1])


def test_two_processes_stop_together(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    options = ("optim.learning_rate=1e30", "optim.warmup_share=0")
    assert train(tmp_path / "run", *UNWATCHED, *shallow(1), *options) == BAD_INPUT
    lines = [line for line in capfd.readouterr().err.splitlines() if "qvgen train" in line or "Traceback" in line]
    assert len(lines) == 1
    assert "the loss is nan in optimizer step 1" in lines[0]


def test_ctrl_c_in_a_terminal_stops_all_processes_after_the_same_step(tmp_path: Path) -> None:
    run_dir, log = tmp_path / "run", tmp_path / "log"
    overrides = (*SHORT, *UNWATCHED, *shallow(1), "steps=200", "checkpoint.keep=9", f"run_dir={run_dir}")
    command = [sys.executable, "-m", "qvgen.cli", "train", *overrides]
    with (
        log.open("wb") as file,
        subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True) as process,
    ):
        metrics = run_dir / "metrics.csv"
        while process.poll() is None and (not metrics.exists() or metrics.read_bytes().count(b"\n") < 3):
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGINT)
    assert process.returncode == INTERRUPTED, log.read_text()
    stopped = re.findall(r"^stopped after step (\d+), saved; continue with: (.*)$", log.read_text(), re.MULTILINE)
    ((step, continued),) = stopped
    assert log.read_text().endswith(f"{continued}\n")
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == [f"step-{int(step):08d}.ckpt"]
    assert len(read_metrics(run_dir)) == int(step)
    said = log.read_text() + (run_dir / "logs" / "rank1.log").read_text()
    assert "Traceback" not in said
    assert "interrupted" not in said


def test_the_second_process_said_nothing_but_its_log(both: tuple[Path, Path]) -> None:
    log = (both[1] / "logs" / "rank1.log").read_text()
    assert "Traceback" not in log
    assert "deprecated" not in log


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (("batch_size=4",), 2),
        (("batch_size=5",), 1),
        (("batch_size=4", "accumulate=4"), 4),
        (("batch_size=4", "devices=2", "strategy=ddp"), 1),
    ],
)
def test_a_step_has_two_parts_or_more(overrides: tuple[str, ...], expected: int) -> None:
    assert step_batch(train_config(*overrides)).num_micro_batches == expected
