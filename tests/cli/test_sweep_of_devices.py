"""Sweeps whose jobs have two processes each, in one process and through launchers: each job is what its command is alone.

Hydra's submitit launcher takes part where it is installed: ``pip install hydra-submitit-launcher``.
"""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path

import pytest

from qvgen.cli import DONE
from tests.cli.test_launcher import BACKWARDS, sweep
from tests.runs import SHORT, UNSEEN, packed_bytes, read_metrics, shallow, train

KEYS = (*SHORT, *UNSEEN, *shallow(1), "steps=6", "phi.ranks=[2]", "phi.tail_share=0.5", "devices=2", "strategy=ddp")
MINUTES = "hydra.launcher.timeout_min=30"
LAUNCHERS = {
    "none": (),
    "a stand-in": (BACKWARDS,),
    "submitit": ("hydra/launcher=submitit_local", MINUTES),
    "submitit's jobs of SLURM": ("hydra/launcher=submitit_slurm", MINUTES),
}
SLURM = {
    "sbatch": """
echo "Submitted batch job 77"
export SLURM_ARRAY_JOB_ID=77 SLURM_NTASKS=1 SLURM_NNODES=1 SLURM_JOB_NODELIST=localhost
for index in 0 1; do SLURM_JOB_ID=$((78 + index)) SLURM_ARRAY_TASK_ID=$index bash "$1" > /dev/null 2>&1 & done
""",
    "srun": """
while :; do
    case "$1" in --unbuffered) shift;; --output) out=$2; shift 2;; --error) err=$2; shift 2;; *) break;; esac
done
named() { echo "$1" | sed "s/%A/$SLURM_ARRAY_JOB_ID/; s/%a/$SLURM_ARRAY_TASK_ID/; s/%t/0/"; }
export SLURM_STEP_ID=0 SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NODEID=0 SLURM_STEP_NUM_TASKS=1
export SLURM_STEP_NODELIST=localhost SLURM_STEP_TASKS_PER_NODE=1
exec "$@" > "$(named "$out")" 2> "$(named "$err")"
""",
    "sacct": """
echo "JobID|State|NodeList"
for index in 0 1; do echo "77_$index|RUNNING|localhost"; done
""",
}
"""What submitit asks of SLURM: an array of two jobs of one task each, with the variables that a task finds."""
needs_submitit = pytest.mark.skipif(
    importlib.util.find_spec("submitit") is None, reason="hydra-submitit-launcher is not installed"
)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Each job's command by itself."""
    runs = {bits: tmp_path_factory.mktemp("alone") / "run" for bits in (4, 3)}
    for bits, run_dir in runs.items():
        assert train(run_dir, *KEYS, f"bits={bits}") == DONE
    return runs


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands in the place of SLURM's."""
    (tmp_path / "commands").mkdir()
    for name, lines in SLURM.items():
        (tmp_path / "commands" / name).write_text(f"#!/bin/sh{lines}")
        (tmp_path / "commands" / name).chmod(0o755)
    monkeypatch.setenv("PATH", os.pathsep.join([str(tmp_path / "commands"), os.environ["PATH"]]))


@pytest.mark.usefixtures("slurm")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=needs_submitit if "submitit" in name else ()) for name in LAUNCHERS]
)
def test_each_job_is_one_training_of_two_processes(name: str, alone: dict[int, Path], tmp_path: Path) -> None:
    words = ("train", "-m", "bits=4,3", *KEYS, f"run_dir={tmp_path / 'runs'}", "resume=true", *LAUNCHERS[name])
    done = sweep(tmp_path, *words)
    assert done.returncode == DONE, done.stderr
    for bits, other in alone.items():
        job = tmp_path / "runs" / f"bits-{bits}"
        assert packed_bytes(job) == packed_bytes(other)
        assert read_metrics(job) == read_metrics(other)
        assert [file.name for file in (job / "logs").glob("rank*.log")] == ["rank1.log"]
        assert "devices: 2" in (job / "config.yaml").read_text()
        assert f"bits={bits}" in json.loads((job / "report.json").read_text())["command"]
    assert sweep(tmp_path, *words).returncode == DONE  # as a queue does that starts the jobs again
    if name == "a stand-in":
        assert sorted(file.read_text() for file in (tmp_path / "outputs" / "launch").glob("*/*.exit")) == ["0"] * 4
