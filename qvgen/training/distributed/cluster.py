"""What Lightning has to know about the processes of a run, whoever started them: ranks by constructor, nothing to guess."""

from __future__ import annotations

from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment

from qvgen.config.processes.launched_world import LaunchedWorld
from qvgen.training.distributed.child_command import guard_world_size


class GivenRanks(ClusterEnvironment):
    """Ranks of the processes of one machine; of those that another launcher started, on one or several, where it is given.

    Args:
        rank: This process, 0 .. world_size-1.
        world_size: All processes.
        port: TCP port where they find each other.
        world: The launcher's, whose ranks these are; None: they are all on this machine.
    """

    def __init__(self, *, rank: int, world_size: int, port: int, world: LaunchedWorld | None = None) -> None:
        self._rank = rank
        self._world_size = world_size
        self._port = port
        self._world = world

    @property
    def creates_processes_externally(self) -> bool:
        """True: Lightning starts no process."""
        return True

    @property
    def main_address(self) -> str:
        """Of rank 0's machine."""
        return "127.0.0.1" if self._world is None else self._world.address

    @property
    def main_port(self) -> int:
        """Port of rank 0."""
        return self._port

    @staticmethod
    def detect() -> bool:
        """False: it is given, never detected."""
        return False

    def world_size(self) -> int:
        """All processes."""
        return self._world_size

    def set_world_size(self, size: int) -> None:
        """Check what Lightning computed from its devices against what was started; raises RuntimeError."""
        guard_world_size(size, expected=self._world_size)

    def global_rank(self) -> int:
        """Rank of this process among all of the run."""
        return self._rank

    def set_global_rank(self, rank: int) -> None:
        """Check what Lightning computed; a launcher may deal out ranks over the nodes in an order of its own."""
        is_ours = self._world is None
        assert not is_ours or rank == self._rank, (
            f"Lightning calls this rank {rank}, it was started as rank {self._rank}"
        )

    def local_rank(self) -> int:
        """Rank of this process among those of its machine."""
        return self._rank if self._world is None else self._world.local_rank

    def node_rank(self) -> int:
        """Number of this machine among those of the run."""
        return 0 if self._world is None else self._world.node_rank


def group_backend(*, on_gpu: bool, shares_on_host: bool) -> str:
    """The backend of a run's process group, as torch names it, whoever started the processes.

    Args:
        on_gpu: Whether they compute on GPUs.
        shares_on_host: Whether shares lie in the host's memory, so that processes of GPUs talk about tensors there, too.

    Example:
        >>> [group_backend(on_gpu=gpu, shares_on_host=host) for gpu, host in ((False, True), (True, False), (True, True))]
        ['gloo', 'nccl', 'cpu:gloo,cuda:nccl']
    """
    if not on_gpu:
        return "gloo"
    return "cpu:gloo,cuda:nccl" if shares_on_host else "nccl"
