"""Other launchers around this process: torchrun's and SLURM's tasks become one training, those of others are refused.

qvgen starts the processes of one machine itself (launcher.py). torchrun and srun start them on one or several machines, and
say which is which: :func:`find_world` reads it (SLURM's in slurm.py). MPI and Kubeflow do not say which of their tasks share
a machine, or not in variables that one can rely on; every task of theirs would train the same run alone, so they are refused
and told to start torchrun on each machine. One task is no harm: an allocation, `srun --ntasks=1`, one pod.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

from qvgen.config.processes.launched_world import LaunchedWorld
from qvgen.errors import UnfitEnvironmentError
from qvgen.training.distributed.slurm import number, slurm_world

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
    "TORCHELASTIC_RUN_ID",
    "TORCHELASTIC_USE_AGENT_STORE",
)
"""Variables by which torch and Lightning guess ranks, and by which a child would take itself for a task of torchrun's; ours
are given explicitly."""


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


_STARTING_VERBS = ("generate", "ptq")
"""Verbs of one process that start others themselves."""

_LAUNCHERS = (
    _Launcher("Open MPI", ("OMPI_COMM_WORLD_RANK",), ("OMPI_COMM_WORLD_SIZE",)),
    _Launcher("MVAPICH", ("MV2_COMM_WORLD_RANK",), ("MV2_COMM_WORLD_SIZE",)),
    _Launcher("LSF's jsrun", ("JSM_NAMESPACE_RANK",), ("JSM_NAMESPACE_SIZE",)),
    _Launcher("MPI (PMI)", ("PMI_RANK", "PMIX_RANK"), ("PMI_SIZE",)),
    _Launcher("Kubeflow", ("RANK",), ("WORLD_SIZE",), needs=("KUBERNETES_SERVICE_HOST", "MASTER_ADDR")),
    _Launcher("Kubeflow", ("RANK",), ("WORLD_SIZE",), needs=("KUBERNETES_PORT", "MASTER_ADDR")),
)


def find_world(environment: Mapping[str, str], *, refuses: bool = True) -> LaunchedWorld | None:
    """The processes that torchrun or SLURM started for this command; None where this is the only one.

    Args:
        environment: The process's.
        refuses: Raise for several tasks of another launcher, too.

    Raises:
        RuntimeError: Another launcher started several processes, or this one did not say all; variables are named.
    """
    world = _torchrun_world(environment) or (None if "TORCHELASTIC_RUN_ID" in environment else slurm_world(environment))
    if world is not None:
        return world
    if refuses and "TORCHELASTIC_RUN_ID" not in environment:
        _refuse_others(environment)
    return None


def refuse_world(verb: str, world: LaunchedWorld | None) -> None:
    """Refuse to do alone, in each process of a world, what one process does.

    Raises:
        RuntimeError: There is a world.
    """
    if world is not None:
        raise UnfitEnvironmentError(
            f"{world.launcher} started {world.size} processes, and qvgen {verb} is the work of one: each would do all of it; "
            f"start it once, with plain python{' and devices=N for N GPUs' if verb in _STARTING_VERBS else ''}"
        )


def _torchrun_world(environment: Mapping[str, str]) -> LaunchedWorld | None:
    if "TORCHELASTIC_RUN_ID" not in environment:
        return None
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "MASTER_PORT")
    found = {name: number(environment, name) for name in names}
    missing = [name for name in (*names, "MASTER_ADDR") if not environment.get(name)]
    rank, size, local_rank, local_size, node_rank, nodes, port = (value or 0 for value in found.values())
    if missing or not size:
        raise UnfitEnvironmentError(
            f"torchrun started this process (TORCHELASTIC_RUN_ID is set), but {', '.join(missing)} is not in its "
            "environment; start it with torchrun itself, or unset TORCHELASTIC_RUN_ID"
        )
    if size == 1:
        return None
    if nodes * local_size != size:
        raise UnfitEnvironmentError(
            f"torchrun started {size} processes on {nodes} nodes, {local_size} of them here; every node must have as many: "
            "give all the same --nproc-per-node"
        )
    return LaunchedWorld(
        launcher="torchrun",
        rank=rank,
        size=size,
        local_rank=local_rank,
        local_size=local_size,
        node_rank=node_rank,
        nodes=nodes,
        address=environment["MASTER_ADDR"],
        port=port,
        session=f"{environment['TORCHELASTIC_RUN_ID']}.{number(environment, 'TORCHELASTIC_RESTART_COUNT') or 0}",
        has_store=environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
    )


def _refuse_others(environment: Mapping[str, str]) -> None:
    for launcher in _LAUNCHERS:
        if all(name in environment for name in launcher.needs):
            found = {name: number(environment, name) for name in (*launcher.rank, *launcher.size)}
            shown = ", ".join(f"{name}={value}" for name, value in found.items() if value is not None)
            ranks, sizes = ([found[name] or 0 for name in names] for names in (launcher.rank, launcher.size))
            if max(*ranks, *(size - 1 for size in sizes)) > 0:
                raise UnfitEnvironmentError(
                    f"this is one of several tasks that {launcher.name} started ({shown}), and each would do the whole "
                    "work alone: start it once, with devices=N for the N devices of one machine, or, to train, torchrun on "
                    "each of several machines"
                )


def forget_ranks(environment: MutableMapping[str, str]) -> None:
    """Remove what another launcher left in an environment, in place."""
    for name in RANK_VARIABLES:
        if environment.pop(name, None) is not None:
            log.info("ignoring %s from the environment", name)
