"""Real launchers of a training: torchrun's agents, and one in the place of SLURM's srun that sets SLURM's variables."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from qvgen.training.distributed.child_command import free_port
from tests.warm_python import ROOT

TRAIN = [sys.executable, str(ROOT / "train.py")]


def start(command: Sequence[str], log: Path, variables: dict[str, str] | None = None) -> subprocess.Popen[bytes]:
    """Start a process that writes to a file."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    environment = {**os.environ, "PYTHONPATH": path, **(variables or {})}
    with log.open("wb") as file:
        return subprocess.Popen(list(command), stdout=file, stderr=file, cwd=ROOT, env=environment)


def torchrun(
    folder: Path,
    *words: str,
    nodes: int = 1,
    each: int = 2,
    restarts: int = 0,
    variables: dict[str, str] | None = None,
) -> list[subprocess.Popen[bytes]]:
    """The agents of torchrun, one for each node, which start ``train.py`` with these words.

    Their logs are ``torchrun0.log`` and so on, their tasks' too.
    """
    agent = [sys.executable, "-m", "tests.torchrun_program", "--nnodes", str(nodes), "--nproc-per-node", str(each)]
    agent += ["--max-restarts", str(restarts)]
    endpoint = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{free_port()}", "--local-addr", "localhost"]
    return [
        start([*agent, *endpoint, "--no-python", *TRAIN, *words], folder / f"torchrun{node}.log", variables)
        for node in range(nodes)
    ]


def srun(
    folder: Path, *words: str, tasks: int = 2, nodes: int = 1, variables: dict[str, str] | None = None
) -> list[subprocess.Popen[bytes]]:
    """The tasks of a step, with the variables that srun gives them; their logs are ``task0.log`` and so on."""
    port, each, processes = str(free_port()), tasks // nodes, []
    for rank in range(tasks):
        own = {
            "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_PROCID": str(rank), "SLURM_NTASKS": str(tasks),
            "SLURM_STEP_NUM_TASKS": str(tasks), "SLURM_LOCALID": str(rank % each), "SLURM_NODEID": str(rank // each),
            "SLURM_STEP_NUM_NODES": str(nodes), "SLURM_STEP_NODELIST": "localhost", "MASTER_PORT": port,
            "SLURM_STEP_TASKS_PER_NODE": f"{each}(x{nodes})" if nodes > 1 else str(each), "SLURM_JOB_NUM_NODES": str(nodes),
        }  # fmt: skip
        processes.append(start([*TRAIN, *words], folder / f"task{rank}.log", {**own, **(variables or {})}))
    return processes


def codes(processes: Sequence[subprocess.Popen[bytes]]) -> list[int]:
    """Wait for processes; their exit codes."""
    return [process.wait() for process in processes]


def said(folder: Path) -> str:
    """What all processes wrote, rank by rank."""
    return "".join(file.read_text(errors="replace") for file in sorted(folder.glob("*.log")))
