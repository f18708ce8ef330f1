"""Other launchers around this process: what they leave in the environment is forgotten, several of their tasks are refused.

qvgen starts the processes of one machine itself (launcher.py). A launcher that starts the program several times would have
every task train the same run alone. One task is no harm: an allocation of SLURM's, `srun --ntasks=1`, one pod.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

from qvgen.errors import UnfitEnvironmentError

log = logging.getLogger(__name__)

RANK_VARIABLES = (
    "RANK",
    "LOCAL_RANK",
    "GROUP_RANK",
    "NODE_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
)
"""Variables by which torch and Lightning guess ranks; ours are given explicitly."""

_OWN_STEPS = 4_294_967_280
"""Numbers from here on are SLURM's own steps (batch script, interactive shell, extern): no `srun` started this process."""


@dataclass(frozen=True)
class _Launcher:
    """How a launcher tells a task which one it is.

    Attributes:
        name: As users call it.
        rank: Variables with the task's number, the first one that is there counts.
        size: Variables with the number of tasks.
        needs: Variables that must be there, besides: the others alone may be anybody's.
    """

    name: str
    rank: tuple[str, ...]
    size: tuple[str, ...]
    needs: tuple[str, ...] = ()


_LAUNCHERS = (
    _Launcher("Open MPI", ("OMPI_COMM_WORLD_RANK",), ("OMPI_COMM_WORLD_SIZE",)),
    _Launcher("MVAPICH", ("MV2_COMM_WORLD_RANK",), ("MV2_COMM_WORLD_SIZE",)),
    _Launcher("LSF's jsrun", ("JSM_NAMESPACE_RANK",), ("JSM_NAMESPACE_SIZE",)),
    _Launcher("MPI (PMI)", ("PMI_RANK", "PMIX_RANK"), ("PMI_SIZE",)),
    _Launcher("Kubeflow", ("RANK",), ("WORLD_SIZE",), needs=("KUBERNETES_SERVICE_HOST", "MASTER_ADDR")),
    _Launcher("Kubeflow", ("RANK",), ("WORLD_SIZE",), needs=("KUBERNETES_PORT", "MASTER_ADDR")),
)


def refuse_foreign_launcher(environment: Mapping[str, str]) -> None:
    """Refuse to be one of several tasks of another launcher: each would train the same run alone.

    Raises:
        RuntimeError: torchrun started this process, or another launcher started several; task and variables are named.
    """
    if "TORCHELASTIC_RUN_ID" in environment:
        raise UnfitEnvironmentError(
            "this process was started by torchrun (TORCHELASTIC_RUN_ID is set); "
            "start it with plain python and devices=N strategy=ddp, it starts the other processes itself"
        )
    _refuse_slurm(environment)
    for launcher in _LAUNCHERS:
        if all(name in environment for name in launcher.needs):
            rank, rank_name = _number(environment, launcher.rank)
            size, size_name = _number(environment, launcher.size)
            if max(rank or 0, (size or 1) - 1) > 0:
                _refuse(launcher.name, {rank_name: rank, size_name: size}, fix="start it once")


def _refuse_slurm(environment: Mapping[str, str]) -> None:
    """An allocation of several tasks may hold one process; a step of several, or a task that is not the first, may not."""
    rank, rank_name = _number(environment, ("SLURM_PROCID",))
    step, _ = _number(environment, ("SLURM_STEP_ID", "SLURM_STEPID"))
    size, size_name = _number(environment, ("SLURM_STEP_NUM_TASKS",))
    if size is None and step is not None:
        size, size_name = _number(environment, ("SLURM_NTASKS", "SLURM_NPROCS"))
    if step is not None and step >= _OWN_STEPS:
        size = None
    if (rank or 0) > 0 or (size or 1) > 1:
        _refuse("SLURM", {rank_name: rank, size_name: size}, fix="use srun --ntasks=1, or sbatch without srun")


def _refuse(name: str, found: Mapping[str, int | None], *, fix: str) -> None:
    shown = ", ".join(f"{variable}={value}" for variable, value in found.items() if variable and value is not None)
    raise UnfitEnvironmentError(
        f"this is one of several tasks that {name} started ({shown}), and each would train the whole run alone: {fix}, "
        "with devices=N strategy=ddp for the N devices of one machine; several machines do not work yet"
    )


def _number(environment: Mapping[str, str], names: tuple[str, ...]) -> tuple[int | None, str]:
    """The first of some variables that holds a number, and its name."""
    for name in names:
        text = environment.get(name, "")
        if text.isdigit():
            return int(text), name
    return None, ""


def forget_ranks(environment: MutableMapping[str, str]) -> None:
    """Remove what another launcher left in an environment, in place."""
    for name in RANK_VARIABLES:
        if environment.pop(name, None) is not None:
            log.info("ignoring %s from the environment", name)
