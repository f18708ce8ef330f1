"""The processes that another launcher (torchrun, SLURM's srun) started for one training, as this one of them sees them.

Found in the environment by :mod:`qvgen.training.distributed.foreign_launcher` and entered once, before anything is composed:
``devices`` and ``num_nodes`` of a configuration are the launcher's where nobody wrote them. A plain start has no such world.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qvgen.errors import UserError


@dataclass(frozen=True, kw_only=True)
class LaunchedWorld:
    """Where this process stands among all that were started.

    Attributes:
        launcher: As users call it: torchrun, SLURM.
        rank: This process, 0 .. size-1, over all nodes.
        size: All processes, ``nodes`` x ``local_size``.
        local_rank: This process among those of its node; its GPU.
        local_size: Processes of each node.
        node_rank: This node.
        nodes: Machines.
        address: Name or address of the node where rank 0 runs.
        port: TCP port there, where the processes find each other.
        session: Tells this start from earlier ones that may use the same store.
        has_store: Whether the launcher serves a store of torch.distributed at that port; rank 0 does otherwise.
    """

    launcher: str
    rank: int
    size: int
    local_rank: int
    local_size: int
    node_rank: int
    nodes: int
    address: str
    port: int
    session: str
    has_store: bool

    @property
    def label(self) -> str:
        """The world in words, for a plan and for the log.

        Example:
            >>> LaunchedWorld(launcher="SLURM", rank=3, size=4, local_rank=1, local_size=2, node_rank=1, nodes=2,
            ...     address="n1", port=15000, session="7.0", has_store=False).label
            'world: 4 processes, 2 on each of 2 nodes, started by SLURM; rank 0 at n1:15000'
        """
        each = f"{self.local_size} on each of {self.nodes} nodes" if self.nodes > 1 else "on one node"
        return f"world: {self.size} processes, {each}, started by {self.launcher}; rank 0 at {self.address}:{self.port}"


_current: LaunchedWorld | None = None


def enter(world: LaunchedWorld | None) -> None:
    """Say in which world the commands of this process run from now on; None: in one that qvgen starts itself."""
    global _current
    _current = world


def current() -> LaunchedWorld | None:
    """The world that another launcher started; None after a plain start."""
    return _current


def whose(item: str | None) -> str:
    """Words in front of what went wrong: which task of a launcher it is, and at what; none after a plain start.

    Args:
        item: What the process was busy with; None: it had not begun, where all tasks say the same.
    """
    if _current is None or item is None:
        return ""
    return f"rank {_current.rank} on {socket.gethostname()}, at {item}: "


def launched_nodes() -> int:
    """Machines; 1 after a plain start."""
    return 1 if _current is None else _current.nodes


def check_world(plains: Sequence[Mapping[str, Any]]) -> None:
    """Raise UserError where a command asks for other processes than there are, before anything is computed.

    Args:
        plains: The configurations of its jobs.
    """
    world = _current
    for plain in plains:
        devices, nodes = plain.get("devices"), plain.get("num_nodes", 1)
        if world is None:
            if nodes != 1 and not plain.get("dry_run"):
                raise UserError(
                    f"num_nodes={nodes}: a plain start has one machine; start it on every node: torchrun --nnodes {nodes} "
                    f"--nproc-per-node {devices} --rdzv-backend c10d --rdzv-endpoint HOST:29400 train.py ..., or with "
                    f"srun --nodes {nodes} --ntasks-per-node {devices} python train.py ... (docs/distributed.md)"
                )
        elif (devices, nodes) != (world.local_size, world.nodes):
            raise UserError(
                f"devices={devices} num_nodes={nodes} are not what {world.launcher} started: {world.local_size} processes on "
                f"each of {world.nodes} nodes; leave both out, or start as many"
            )
    if world is not None and len(plains) > 1:
        raise UserError(
            f"{len(plains)} jobs: the {world.size} processes that {world.launcher} started are for one training; start each "
            "job by itself"
        )
