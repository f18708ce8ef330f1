"""A sweep through Hydra's submitit launcher itself, where it is installed: ``pip install hydra-submitit-launcher``.

Each job is one process tree of ours with as many processes as it asks for, and does what its command does alone.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qvgen.cli import DONE
from tests.runs import SHORT, UNSEEN, packed_bytes, read_metrics, shallow, train
from tests.warm_python import ROOT

pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="hydra-submitit-launcher is not installed")

KEYS = (*SHORT, *UNSEEN, *shallow(1), "steps=6", "phi.ranks=[2]", "phi.tail_share=0.5", "devices=2", "strategy=ddp")
LOCAL = ("hydra/launcher=submitit_local", "hydra.launcher.timeout_min=30")


def sweep(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(filter(None, sys.path))
    return subprocess.run(
        [sys.executable, str(ROOT / "train.py"), "-m", *words],
        cwd=folder, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_each_job_is_one_training_of_two_processes_and_goes_on(tmp_path: Path) -> None:
    words = ("bits=4,3", *KEYS, "resume=true", f"run_dir={tmp_path / 'runs'}", *LOCAL)
    done = sweep(tmp_path, *words)
    assert done.returncode == DONE, done.stderr
    (launch,) = (tmp_path / "outputs" / "launch").iterdir()
    assert {file.name: file.read_text() for file in launch.glob("*.exit")} == {"0.exit": "0", "1.exit": "0"}
    jobs = sorted(folder for folder in (launch / ".submitit").iterdir() if folder.name.isdigit())
    assert len(jobs) == 2
    for bits in (4, 3):
        job, alone = tmp_path / "runs" / f"bits-{bits}", tmp_path / f"alone-{bits}"
        assert train(alone, *KEYS, f"bits={bits}") == DONE
        assert packed_bytes(job) == packed_bytes(alone)
        assert read_metrics(job) == read_metrics(alone)
        assert [file.name for file in (job / "logs").glob("rank*.log")] == ["rank1.log"]
        assert "devices: 2" in (job / "config.yaml").read_text()
        assert f"bits={bits}" in json.loads((job / "report.json").read_text())["command"]
    assert sweep(tmp_path, *words).returncode == DONE  # the same command, as of a job that was requeued


def test_what_a_slurm_sweep_asks_for_is_composed() -> None:
    words = ("bits=4,3", "hydra/launcher=submitit_slurm", "hydra.launcher.gpus_per_node=8", "--cfg", "hydra")
    done = sweep(ROOT, *words)
    assert done.returncode == DONE, done.stderr
    assert "_target_: hydra_plugins.hydra_submitit_launcher.submitit_launcher.SlurmLauncher" in done.stdout
    assert "gpus_per_node: 8" in done.stdout
