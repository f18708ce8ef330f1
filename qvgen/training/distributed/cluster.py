"""What Lightning has to know about the processes that launcher.py started: ranks by constructor, nothing to guess."""

from __future__ import annotations

from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment

from qvgen.training.distributed.launcher import guard_world_size


class OneMachine(ClusterEnvironment):
    """Ranks of the processes of one machine.

    Args:
        rank: This process, 0 .. world_size-1.
        world_size: All processes.
        port: TCP port where they find each other.
    """

    def __init__(self, *, rank: int, world_size: int, port: int) -> None:
        self._rank = rank
        self._world_size = world_size
        self._port = port

    @property
    def creates_processes_externally(self) -> bool:
        """True: Lightning starts no process."""
        return True

    @property
    def main_address(self) -> str:
        """This machine."""
        return "127.0.0.1"

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
        """This process."""
        return self._rank

    def set_global_rank(self, rank: int) -> None:
        """Check what Lightning computed against what was given."""
        assert rank == self._rank, f"Lightning calls this rank {rank}, it was started as rank {self._rank}"

    def local_rank(self) -> int:
        """This process, among those of the machine: the same."""
        return self._rank

    def node_rank(self) -> int:
        """0: there is one machine."""
        return 0
