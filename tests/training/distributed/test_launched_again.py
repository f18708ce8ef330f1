"""Runs that another launcher starts again: SLURM's requeued job, torchrun's restarts, and after a rank was killed.

All with ``resume=true`` in a command that never changes, against the run of devices=2 that nobody stopped: the same bytes.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from qvgen.cli import BAD_INPUT, DONE
from qvgen.training.checkpoint_writer import checkpoints
from qvgen.training.distributed.child_command import free_port
from tests.runs import BOUNDARIES, SHORT, UNSEEN, load_state, packed_bytes, read_metrics, shallow, train
from tests.training.distributed.launchers import TRAIN, codes, said, srun, start, torchrun
from tests.training.distributed.test_launched_runs import own_lines, wait_for_rows
from tests.warm_python import ROOT

CALLBACK = "+callbacks.kill._target_=tests.training.distributed.killed_rank.KilledRank"
KEYS = (*SHORT, *UNSEEN, "bits=3", *shallow(1), "checkpoint.every_steps=2", "checkpoint.keep=99", CALLBACK)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of devices=2, started plainly."""
    run_dir = tmp_path_factory.mktemp("plain") / "run"
    assert train(run_dir, *KEYS, "devices=2", "strategy=ddp") == DONE
    return run_dir


def check_same(run_dir: Path, plain: Path) -> None:
    assert packed_bytes(run_dir) == packed_bytes(plain)
    assert read_metrics(run_dir) == read_metrics(plain)


def program(folder: Path, name: str, *lines: str) -> None:
    """A command for a shell."""
    file = folder / name
    file.write_text("\n".join(["#!/bin/sh", *lines, ""]))
    file.chmod(0o755)


def test_the_batch_script_of_the_docs_saves_goes_back_to_the_queue_and_goes_on(plain: Path, tmp_path: Path) -> None:
    run_dir, commands = tmp_path / "run", tmp_path / "commands"
    page = (ROOT / "docs" / "distributed.md").read_text(encoding="utf-8")
    (script,) = re.findall(r"```sh\n(.*?)```", page, re.DOTALL)
    keys = " ".join([*(f"'{key}'" for key in KEYS), "strategy=ddp", f"run_dir={run_dir}"])
    script, count = re.subn(r"(train\.py) .*(resume=true)$", rf"\1 {keys} \2", script, flags=re.MULTILINE)
    assert count == 1
    commands.mkdir()
    (tmp_path / "script.sh").write_text(script)
    program(commands, "python", f'exec {sys.executable} "$@"')
    program(commands, "srun", f'exec {sys.executable} {Path(__file__).with_name("srun_program.py")} "$@"')
    program(commands, "scontrol", f'echo "$@" >> {tmp_path}/scontrol.txt')
    job = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "MASTER_PORT": str(free_port())}
    job["PATH"] = os.pathsep.join([str(commands), os.environ["PATH"]])

    def queue(restarts: int) -> subprocess.Popen[bytes]:
        more = {"SLURM_RESTART_COUNT": str(restarts)} if restarts else {}
        return start(["bash", str(tmp_path / "script.sh")], tmp_path / f"job{restarts}.log", {**job, **more})

    batch = queue(0)
    wait_for_rows(run_dir, 3, [batch])
    (step,) = Path(f"/proc/{batch.pid}/task/{batch.pid}/children").read_text().split()
    os.kill(int(step), signal.SIGUSR1)  # as SLURM does to a step, and not to its script
    batch.wait()
    assert (tmp_path / "scontrol.txt").read_text() == "requeue 7\n", said(tmp_path)
    (line,) = own_lines(said(tmp_path))
    assert re.match(r"stopped after step \d+, saved; continue with: ", line)
    assert not (run_dir / "packed").exists()
    assert queue(1).wait() == DONE, said(tmp_path)
    assert (tmp_path / "scontrol.txt").read_text() == "requeue 7\n"
    check_same(run_dir, plain)


@pytest.mark.parametrize("rank", [0, 1])
def test_torchrun_starts_a_run_again_whose_worker_was_killed(rank: int, plain: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    words = (*KEYS, "strategy=ddp", f"run_dir={run_dir}", "resume=true")
    (agent,) = torchrun(tmp_path, *words, restarts=1, variables={"QVGEN_TEST_KILL": f"{rank}:{BOUNDARIES[0]}"})
    assert agent.wait() == 0, said(tmp_path)
    assert said(tmp_path).count("world: 2 processes, on one node, started by torchrun") == 2
    check_same(run_dir, plain)


@pytest.mark.parametrize(
    ("strategy", "step"), [("ddp", BOUNDARIES[0]), ("fsdp", BOUNDARIES[1]), ("fsdp", BOUNDARIES[1] + 2)]
)
def test_a_rank_that_is_killed_leaves_a_run_that_goes_on(strategy: str, step: int, plain: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    words = (*KEYS, f"strategy={strategy}", f"run_dir={run_dir}", "resume=true")
    tasks = srun(tmp_path, *words, variables={"QVGEN_TEST_KILL": f"1:{step}"})
    assert codes(tasks) == [BAD_INPUT, -signal.SIGKILL], said(tmp_path)
    (line,) = own_lines(said(tmp_path))
    assert re.match(
        rf"qvgen train: rank 0 on \S+ lost the others in step {step}: rank 1 \(.*\) is gone; last seen ", line
    )
    last = checkpoints(run_dir / "checkpoints")[-1:]
    saved = {f"step-{step - step % 2:08d}.ckpt"} | (
        {f"step-{step - step % 2 - 2:08d}.ckpt"} if strategy == "fsdp" else set()
    )
    assert {path.name for path in last} <= saved  # that of a sharded model is written while training goes on
    assert codes(srun(tmp_path, *words)) == [DONE, DONE], said(tmp_path)
    check_same(run_dir, plain)


def test_pretraining_under_torchrun_trains_what_a_plain_start_trains(tmp_path: Path) -> None:
    words = ("method=pretrain", "model.num_layers=1", "steps=4", "batch_size=4", "logger=csv", "evaluation.samples=4")
    words += ("strategy=ddp", "checkpoint.every_steps=2")
    own, launched = tmp_path / "own", tmp_path / "launched"
    (agent,) = torchrun(tmp_path, *words, f"run_dir={launched}")
    runs = {launched: agent, own: start([*TRAIN, *words, "devices=2", f"run_dir={own}"], tmp_path / "own.log")}
    for run_dir, process in runs.items():
        while not (run_dir / "checkpoints" / "step-00000004.ckpt").exists():
            assert process.poll() is None, said(tmp_path)
            time.sleep(0.05)
        process.terminate()  # a classifier is trained for what is measured then, which takes minutes
        process.wait()
    assert "world: 2 processes, on one node, started by torchrun" in said(tmp_path)
    assert read_metrics(own) == read_metrics(launched)
    first, second = (load_state(run_dir / "checkpoints" / "step-00000004.ckpt") for run_dir in runs)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
