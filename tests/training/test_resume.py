"""Runs that are interrupted and continued: the packed file must be the uninterrupted run's, byte for byte."""

from __future__ import annotations

import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qvgen.cli import BAD_INPUT, DONE, TERMINATED, main
from qvgen.config import UserError
from qvgen.config.build import build
from qvgen.config.compose import compose_plain
from qvgen.verbs import precompute
from qvgen.verbs import train as verb
from tests.runs import (
    BOUNDARIES,
    SHORT,
    STEPS,
    UNSEEN,
    copy_until,
    load_state,
    one_block,
    packed_bytes,
    read_metrics,
    shallow,
    snapshot,
    train,
    train_config,
)

KEEP = "checkpoint.keep=2"
EVERY = "checkpoint.every_steps=4"
"""No multiple of where the runs are killed, nor of Phi's phases."""


def start(run_dir: Path, *overrides: str) -> subprocess.Popen[bytes]:
    """The same command in a process of its own."""
    command = [sys.executable, "-m", "qvgen.cli", "train", *SHORT, f"run_dir='{run_dir}'", *overrides]
    # A suite that runs in the background of a shell ignores Ctrl-C, and its children would inherit that.
    ours = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with (run_dir.parent / f"{run_dir.name}.log").open("wb") as log:
            return subprocess.Popen(command, stdout=log, stderr=log)
    finally:
        signal.signal(signal.SIGINT, ours)


def wait_for_rows(run_dir: Path, count: int, process: subprocess.Popen[bytes]) -> None:
    """Return as soon as metrics.csv has so many rows: the next step is being computed then."""
    metrics = run_dir / "metrics.csv"
    deadline = time.monotonic() + 240
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < count + 1:
        assert process.poll() is None, run_dir.with_name(f"{run_dir.name}.log").read_text()
        assert time.monotonic() < deadline, "it did not get there in time"
        time.sleep(0.002)


def test_a_killed_run_continues_to_the_same_bytes(block_run: Path, tmp_path: Path) -> None:
    """Killed in the first step of a phase."""
    run_dir = tmp_path / "run"
    with start(run_dir, *one_block(), EVERY) as process:
        wait_for_rows(run_dir, BOUNDARIES[1], process)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert BOUNDARIES[1] <= len(read_metrics(run_dir)) < STEPS
    assert not (run_dir / "packed").exists()
    (run_dir / ".manifest.json.1.tmp").write_bytes(b"half")
    assert train(run_dir, *one_block(), EVERY, "resume=true") == DONE
    assert packed_bytes(run_dir) == packed_bytes(block_run)
    assert read_metrics(run_dir) == read_metrics(block_run)
    assert not list(run_dir.rglob("*.tmp"))


def test_the_configuration_alone_says_how_many_threads_compute() -> None:
    before = torch.get_num_threads()
    config = train_config("data=clips")
    try:
        for threads in (2, 1):
            with pytest.raises(UserError, match="data=clips needs a model with a VAE"):
                verb.run(replace(config, strategy=replace(config.strategy, threads=threads)))
            assert torch.get_num_threads() == threads
        plain = compose_plain("precompute", ["model=tiny", "data=moving_digits", "threads=2"])
        with pytest.raises(UserError, match="has nothing to encode"):
            precompute.run(build("precompute", plain))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    with pytest.raises(UserError, match=r"strategy\.threads=0 must be greater than 0"):
        replace(config.strategy, threads=0)


def test_a_run_killed_after_its_last_step_is_finished(tmp_path: Path) -> None:
    # Without a tail the last columns are dropped after the last step, which is not trained again.
    options = ("steps=2", "phi.ranks=[2]", "phi.tail_share=0", *UNSEEN, *shallow(1))
    assert train(tmp_path / "run", *options) == DONE
    folded = packed_bytes(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "packed")
    assert main(["fold", f"run_dir={tmp_path / 'run'}"]) == DONE
    assert packed_bytes(tmp_path / "run") == folded
    shutil.rmtree(tmp_path / "run" / "packed")
    assert train(tmp_path / "run", *options, "resume=true") == DONE
    assert packed_bytes(tmp_path / "run") == folded
    assert len(read_metrics(tmp_path / "run")) == 2


def test_a_full_disk_leaves_the_checkpoint_before_whole(
    block_run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """And half of a run, a reload and the other half are the whole."""
    # The checkpoint lies on a boundary: the reloaded run itself takes the columns away.
    assert STEPS // 2 in BOUNDARIES
    run_dir = copy_until(block_run, tmp_path / "run", step=STEPS // 2)
    half = load_state(run_dir / "checkpoints" / f"step-{STEPS // 2:08d}.ckpt")
    assert half["student.proj_out.phi.active_rank"] == 2
    kept = {path: path.read_bytes() for path in (run_dir / "checkpoints").iterdir()}
    smallest = min(map(len, kept.values()))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (smallest // 2, hard))
    try:
        assert train(run_dir, *one_block(), EVERY, KEEP, "resume=true") == BAD_INPUT
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    lines = capfd.readouterr().err.splitlines()
    failed = run_dir / "checkpoints" / "step-00000008.ckpt"
    assert lines[-1] == f"qvgen train: {failed}: cannot write it, File too large"
    assert [line for line in lines if "qvgen train" in line or "Traceback" in line] == lines[-1:]
    assert {path: path.read_bytes() for path in (run_dir / "checkpoints").iterdir()} == kept
    assert all(load_state(path) for path in kept)
    assert train(run_dir, *one_block(), EVERY, KEEP, "resume=true") == DONE
    assert packed_bytes(run_dir) == packed_bytes(block_run)
    assert read_metrics(run_dir) == read_metrics(block_run)
    assert not list(run_dir.rglob("*.tmp"))
    assert len(list((run_dir / "checkpoints").iterdir())) == 2


def one_bit_of_a_tensor(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@pytest.mark.parametrize(
    "damage",
    [lambda content: b"", lambda content: content[:100_000], one_bit_of_a_tensor],
    ids=["empty", "cut", "one bit"],
)
def test_a_damaged_checkpoint_is_named(
    damage: Callable[[bytes], bytes], block_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = copy_until(block_run, tmp_path / "run", step=6)
    newest = run_dir / "checkpoints" / "step-00000006.ckpt"
    newest.write_bytes(damage(newest.read_bytes()))
    before = snapshot(run_dir)
    assert train(run_dir, *one_block(), "resume=true") == BAD_INPUT
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{newest} is no checkpoint or damaged; delete it to resume from the one before" in line
    assert main(["fold", f"run_dir={run_dir}"]) == BAD_INPUT
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{newest} is no checkpoint or damaged; delete it to resume from the one before" in line
    assert snapshot(run_dir) == before
    newest.unlink()  # as told
    assert main(["fold", f"run_dir={run_dir}"]) == BAD_INPUT
    assert "Phi still has rank 2" in capsys.readouterr().err  # it was read: the one of step 3


def test_the_printed_command_continues_a_stopped_run_to_the_same_bytes(block_run: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "a run"
    with start(run_dir, *one_block(), "checkpoint.every_steps=50", "checkpoint.keep=1") as process:
        wait_for_rows(run_dir, BOUNDARIES[0] + 1, process)
        process.send_signal(signal.SIGTERM)
    assert process.returncode == TERMINATED
    text = (tmp_path / "a run.log").read_text()
    stopped = re.fullmatch(r"stopped after step (\d+), saved; continue with: (.*)", text.splitlines()[-1])
    assert stopped is not None, text
    assert text.count("stopped") == 1
    assert "Traceback" not in text
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == [f"step-{int(stopped[1]):08d}.ckpt"]
    assert len(read_metrics(run_dir)) == int(stopped[1]) < STEPS
    command = shlex.split(stopped[2])
    assert command[:4] == [sys.executable, "-m", "qvgen.cli", "train"]
    assert command[-1] == "resume=true"
    assert main(command[3:]) == DONE
    assert packed_bytes(run_dir) == packed_bytes(block_run)
    assert read_metrics(run_dir) == read_metrics(block_run)
