"""The world of a SLURM step of several tasks (`srun python train.py ...`), read from the variables that SLURM sets.

Rank 0 runs on the first node of the step's list. Its port follows from the numbers of job and step, so that two steps on
one node have different ones; MASTER_ADDR and MASTER_PORT of the batch script are used in place of both where they are set.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from qvgen.config.processes.launched_world import LaunchedWorld
from qvgen.errors import UnfitEnvironmentError

_OWN_STEPS = 4_294_967_280
"""Numbers from here on are SLURM's own steps (batch script, interactive shell, extern): no `srun` started this process."""

_FIRST_PORT, _NUM_PORTS = 12_000, 20_000
"""Below the ports that Linux gives to whoever asks for any (32768 and up)."""


def slurm_world(environment: Mapping[str, str]) -> LaunchedWorld | None:
    """The world of a step of several tasks; None where SLURM started one task, or none.

    An allocation of several tasks may hold one process (the batch script itself), and a step of one is a plain start.

    Raises:
        RuntimeError: Variables are missing, or the nodes have different numbers of tasks.
    """
    rank = number(environment, "SLURM_PROCID")
    step = number(environment, "SLURM_STEP_ID", "SLURM_STEPID")
    size = number(environment, "SLURM_STEP_NUM_TASKS")
    if (size is None and step is not None) or (rank or 0) > 0:
        size = size or number(environment, "SLURM_NTASKS", "SLURM_NPROCS")
    if step is not None and step >= _OWN_STEPS:
        size = None
    if (rank or 0) == 0 and (size or 1) == 1:
        return None
    local_rank, node_rank = number(environment, "SLURM_LOCALID"), number(environment, "SLURM_NODEID")
    job, listed = number(environment, "SLURM_JOB_ID", "SLURM_JOBID"), _node_list(environment)
    found = {
        "SLURM_PROCID": rank, "SLURM_STEP_NUM_TASKS": size, "SLURM_LOCALID": local_rank, "SLURM_NODEID": node_rank,
        "SLURM_JOB_ID": job, "SLURM_STEP_NODELIST": listed,
    }  # fmt: skip
    if missing := [name for name, value in found.items() if value is None]:
        raise UnfitEnvironmentError(
            f"SLURM started this task as one of several (SLURM_PROCID={rank}), but {', '.join(missing)} is not in its "
            "environment; start it with srun, or once with sbatch and without srun"
        )
    assert rank is not None
    assert size is not None
    assert local_rank is not None
    assert node_rank is not None
    assert job is not None
    assert listed is not None
    per_node = _tasks_per_node(environment, size=size)
    return LaunchedWorld(
        launcher="SLURM",
        rank=rank,
        size=size,
        local_rank=local_rank,
        local_size=per_node[0],
        node_rank=node_rank,
        nodes=len(per_node),
        address=environment.get("MASTER_ADDR") or next(hosts(listed)),
        port=number(environment, "MASTER_PORT") or _FIRST_PORT + (job * 101 + (step or 0)) % _NUM_PORTS,
        session=f"{job}.{step or 0}.{number(environment, 'SLURM_RESTART_COUNT') or 0}",
        has_store=False,
    )


def number(environment: Mapping[str, str], *names: str) -> int | None:
    """The first of some variables that holds a number."""
    return next((int(environment[name]) for name in names if environment.get(name, "").isdigit()), None)


def _node_list(environment: Mapping[str, str]) -> str | None:
    names = ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST")
    return next((environment[name] for name in names if environment.get(name)), None)


def _tasks_per_node(environment: Mapping[str, str], *, size: int) -> list[int]:
    """Tasks of each node; SLURM writes ``8(x4)`` for 8 on each of 4, and ``8(x3),4`` where they differ."""
    text = environment.get("SLURM_STEP_TASKS_PER_NODE", "")
    nodes = number(environment, "SLURM_STEP_NUM_NODES", "SLURM_NNODES", "SLURM_JOB_NUM_NODES") or 1
    if not text and size % nodes == 0:
        return [size // nodes] * nodes
    each: list[int] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        each += [int(count)] * int(times or 1)
    if len(set(each)) != 1 or sum(each) != size:
        raise UnfitEnvironmentError(
            f"SLURM started {size} tasks on {nodes} nodes (SLURM_STEP_TASKS_PER_NODE={text!r}); every node must have as "
            "many: use srun --ntasks-per-node=N"
        )
    return each


def hosts(text: str) -> Iterator[str]:
    """The names in a list of SLURM's, in its order.

    Raises:
        RuntimeError: A bracket that is not closed, or a range that is none.

    Example:
        >>> list(hosts("gpu[08-10,12],login"))
        ['gpu08', 'gpu09', 'gpu10', 'gpu12', 'login']
        >>> list(hosts("rack[1-2]-node[3,5]"))
        ['rack1-node3', 'rack1-node5', 'rack2-node3', 'rack2-node5']
    """
    whole = re.fullmatch(r"(?:[^\[\],]|\[[^\[\]]*\])+(?:,(?:[^\[\],]|\[[^\[\]]*\])+)*", text)
    if whole is None:
        raise UnfitEnvironmentError(f"SLURM's list of nodes {text!r} can't be read; set MASTER_ADDR to rank 0's node")
    for entry in re.findall(r"(?:[^\[\],]|\[[^\[\]]*\])+", text):
        yield from _expanded(entry)


def _expanded(entry: str) -> Iterator[str]:
    before, bracket, rest = entry.partition("[")
    if not bracket:
        yield entry
        return
    ranges, _, after = rest.partition("]")
    for part in ranges.split(","):
        bounds = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if bounds is None:
            raise UnfitEnvironmentError(
                f"SLURM's list of nodes has {part!r} in brackets; set MASTER_ADDR to rank 0's node"
            )
        first, last = bounds[1], bounds[2] or bounds[1]
        for value in range(int(first), int(last) + 1):
            for end in _expanded(after) if after else ("",):
                yield f"{before}{value:0{len(first)}d}{end}"
