"""The traffic of a step between nodes: bytes that leave each node, by what they are; a prediction, no run was measured.

    all-reduce of n bytes over R processes in a ring        each process sends 2 (R - 1) / R n
    all-gather, reduce-scatter (n: the whole)               each process sends   (R - 1) / R n

Processes of a node stand side by side in a ring, so that one of them sends to the next node what the ring moves: that much
leaves the node for each ring that has members elsewhere. (Other algorithms than rings, trees among them, send about as much.)

    ddp     one all-reduce of the gradients, with the last micro-batch
    fsdp    each micro-batch: the student gathered twice, the teacher once, the gradients shared out
    hsdp    the same inside of a group, which costs the network nothing where a group is one node's; each micro-batch, the
            groups reduce the gradients share by share
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from qvgen.training.planning.stored_state import StoredState
from qvgen.training.training_run import TrainingRun


@dataclass(frozen=True, kw_only=True)
class NetworkTraffic:
    """Bytes that leave each node in an optimizer step; as many come in.

    Attributes:
        gathered_bytes: Weights of student and teacher.
        gradient_bytes: Gradients.
    """

    gathered_bytes: int
    gradient_bytes: int

    @property
    def nbytes(self) -> int:
        """All of them."""
        return self.gathered_bytes + self.gradient_bytes

    def seconds(self, gbits: float) -> float:
        """Of a step, where nothing of it goes on beside computing, over a network of so many Gbit/s for each node."""
        return 8 * self.nbytes / (1e9 * gbits)


def network_traffic(
    run: TrainingRun, student: nn.Module, *, teacher: nn.Module | None, stored: StoredState
) -> NetworkTraffic | None:
    """The traffic of a run's steps; None on one node.

    Args:
        run: What is planned.
        student: On the meta device, with what is not trained frozen.
        teacher: On the meta device; None for a method without one.
        stored: Types of weights and gradients.
    """
    if run.num_nodes == 1:
        return None
    gradients, shards, here = stored.gradient_bytes(student), run.shards, run.node_devices
    if shards == 1:
        return NetworkTraffic(gathered_bytes=0, gradient_bytes=_ring(2 * gradients, run.devices))
    weights = 2 * stored.master_bytes(student) + (0 if teacher is None else stored.teacher_bytes(teacher))
    micro_batches, groups = run.steps.batch.num_micro_batches, run.devices // shards
    leaves_node = shards > here
    gathered = _ring(weights, shards) if leaves_node else 0
    inside = _ring(gradients, shards) if leaves_node else 0
    # Each process of a node has a ring of its own over the groups, for its share of the gradients; one where several
    # groups lie on the node, whose processes of one share stand side by side.
    rings = min(here, shards)
    between = _ring(2 * gradients * rings // shards, groups)
    return NetworkTraffic(gathered_bytes=micro_batches * gathered, gradient_bytes=micro_batches * (inside + between))


def _ring(nbytes: int, processes: int) -> int:
    """Bytes that one process of a ring sends, of so many."""
    return nbytes * (processes - 1) // processes
