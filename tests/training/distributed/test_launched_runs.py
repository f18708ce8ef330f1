"""Trainings that torchrun and SLURM start, against the same run started plainly with devices=2: the same bytes."""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from qvgen.cli import BAD_INPUT, DONE, TERMINATED
from qvgen.training.start.file import START_FILE
from tests.runs import SHORT, UNSEEN, packed_bytes, read_metrics, shallow, train
from tests.training.distributed.launchers import codes, said, srun, torchrun

STEPS = 4
KEYS = (*SHORT, *UNSEEN, f"steps={STEPS}", "checkpoint.keep=9", "bits=3", *shallow(1))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of devices=2, started plainly."""
    run_dir = tmp_path_factory.mktemp("plain") / "run"
    assert train(run_dir, *KEYS, "devices=2", "strategy=ddp") == DONE
    return run_dir


def check_same(run_dir: Path, plain: Path) -> None:
    assert (run_dir / START_FILE).read_bytes() == (plain / START_FILE).read_bytes()
    assert packed_bytes(run_dir) == packed_bytes(plain)
    assert read_metrics(run_dir) == read_metrics(plain)
    assert "Traceback" not in (run_dir / "logs" / "rank1.log").read_text()


def own_lines(text: str) -> list[str]:
    """What qvgen said of an end, and tracebacks."""
    return [line for line in text.splitlines() if line.startswith(("qvgen:", "qvgen train:", "stopped", "Traceback"))]


def test_torchrun_on_one_node_is_one_training(plain: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    assert codes(torchrun(tmp_path, *KEYS, f"run_dir={run_dir}")) == [0], said(tmp_path)
    check_same(run_dir, plain)
    assert "world: 2 processes, on one node, started by torchrun" in said(tmp_path)
    assert said(tmp_path).count("report: ") == 1  # rank 0 alone speaks
    assert re.search(r"the start: \d+ layers, set up by 2 processes", said(tmp_path))
    assert "Traceback" not in said(tmp_path)


def test_torchrun_on_two_nodes_shares_the_model_out(plain: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    words = (*KEYS, "strategy=fsdp", "devices=1", "num_nodes=2", f"run_dir={run_dir}")
    assert codes(torchrun(tmp_path, *words, nodes=2, each=1)) == [0, 0], said(tmp_path)
    check_same(run_dir, plain)
    assert "world: 2 processes, 1 on each of 2 nodes, started by torchrun" in said(tmp_path)


def wait_for_rows(run_dir: Path, count: int, processes: Sequence[object]) -> None:
    """Wait until so many steps have their row, or a process has ended."""
    metrics = run_dir / "metrics.csv"
    while all(process.poll() is None for process in processes):  # type: ignore[attr-defined]
        if metrics.exists() and metrics.read_bytes().count(b"\n") > count:
            return
        time.sleep(0.01)


def test_a_signal_to_any_task_of_slurms_stops_all_after_one_step_and_the_requeued_job_goes_on(
    plain: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    words = (*KEYS, "strategy=ddp", f"run_dir={run_dir}", "resume=true")
    tasks = srun(tmp_path, *words)
    wait_for_rows(run_dir, 1, tasks)
    tasks[1].send_signal(signal.SIGUSR1)
    assert codes(tasks) == [TERMINATED, TERMINATED], said(tmp_path)
    (line,) = own_lines(said(tmp_path))
    step = re.match(r"stopped after step (\d+), saved; continue with: ", line)
    assert step is not None, line
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == [f"step-{int(step[1]):08d}.ckpt"]
    assert codes(srun(tmp_path, *words)) == [DONE, DONE], said(tmp_path)
    check_same(run_dir, plain)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("devices=4", "devices=4 num_nodes=1 are not what SLURM started: 2 processes on each of 1 nodes"),
        ("batch_size=5", "batch_size=5 cannot be divided by devices=2 x accumulate=1"),
        ("bits=99", "bits=99"),
    ],
)
def test_bad_input_ends_all_tasks_with_one_line(wrong: str, message: str, tmp_path: Path) -> None:
    words = (*KEYS, "strategy=ddp", wrong, f"run_dir={tmp_path / 'run'}")
    assert codes(srun(tmp_path, *words)) == [BAD_INPUT, BAD_INPUT]
    (line,) = said(tmp_path).splitlines()
    assert line.startswith("qvgen train: ")
    assert message in line
    assert not (tmp_path / "run").exists()


def test_a_plan_says_the_world_once(tmp_path: Path) -> None:
    words = (*KEYS, "strategy=ddp", "dry_run=true", f"run_dir={tmp_path / 'run'}")
    assert codes(srun(tmp_path, *words, nodes=2)) == [DONE, DONE], said(tmp_path)
    lines = said(tmp_path).splitlines()
    world = "world: 2 processes, 1 on each of 2 nodes, started by SLURM; rank 0 at localhost:"
    assert [line for line in lines if line.startswith("world: ")] == [lines[0]]
    assert lines[0].startswith(world)
    assert any(line.startswith(f"steps: {STEPS} of 4 samples = 2 devices x ") for line in lines)


def test_tasks_that_wait_say_that_rank_0_failed(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").touch()
    assert codes(srun(tmp_path, *KEYS, "strategy=ddp", f"run_dir={tmp_path / 'run'}")) == [BAD_INPUT, BAD_INPUT]
    world, first, second = said(tmp_path).splitlines()
    assert world.startswith("world: 2 processes, on one node, started by SLURM; rank 0 at localhost:")
    assert "is not empty (mine.txt) and holds no run" in first
    assert re.match(r"qvgen train: rank 1 on \S+ ends: rank 0 ended with exit code 2 before training began", second)


def test_tasks_that_wait_say_that_rank_0_is_gone(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    tasks = srun(tmp_path, *KEYS, "strategy=ddp", f"run_dir={run_dir}")
    while not (run_dir / "config.yaml").exists():
        assert tasks[0].poll() is None, said(tmp_path)
        time.sleep(0.01)
    tasks[0].kill()
    assert codes(tasks) == [-signal.SIGKILL, BAD_INPUT]
    (line,) = own_lines(said(tmp_path))
    assert re.match(r"qvgen train: rank 1 on \S+ ends: rank 0 at localhost:\d+ is gone; see its output", line)


def test_a_task_that_dies_in_training_is_named_by_the_others(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    tasks = srun(tmp_path, *KEYS, "strategy=ddp", f"run_dir={run_dir}", "steps=200")
    wait_for_rows(run_dir, 2, tasks)
    tasks[1].kill()
    assert codes(tasks) == [BAD_INPUT, -signal.SIGKILL]
    (line,) = own_lines(said(tmp_path))
    gone = r"rank 1 \(process \d+ on \S+\) is gone; last seen (computing|in the backward pass|done), step \d+"
    assert re.match(rf"qvgen train: rank 0 on \S+ lost the others in step \d+: {gone}", line), line


def test_a_task_that_hangs_is_named_and_ends_the_run(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    words = (*KEYS, "strategy=ddp", f"run_dir={run_dir}", "steps=200", "training.hang_minutes=0.15")
    zero, one = srun(tmp_path, *words)
    wait_for_rows(run_dir, 3, [zero, one])
    one.send_signal(signal.SIGSTOP)
    assert zero.wait() == BAD_INPUT, said(tmp_path)
    one.kill()
    one.wait()
    silent = rf"rank 1 \(process {one.pid} on \S+, stopped by a signal\) has not reported since [\d:]+, \d+ s ago: "
    line = rf"^{silent}.*, step \d+: ended after training\.hang_minutes=0\.15; stopped "
    assert re.search(line, (tmp_path / "task0.log").read_text(), re.MULTILINE), said(tmp_path)
