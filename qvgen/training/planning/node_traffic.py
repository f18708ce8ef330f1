"""The traffic of a step between nodes: bytes that leave each node, by what they are; a prediction, no run was measured.

Processes of a node stand side by side in a ring, so that one of them sends to the next node what the ring moves: what one
process sends (:mod:`qvgen.training.planning.network`) leaves the node for each ring that has members elsewhere. (Other
algorithms than rings, trees among them, send about as much.)

    ddp     one ring, of all processes
    fsdp    one ring, of all processes
    hsdp    inside of a group one ring, which costs the network nothing where a group is one node's; between groups, each
            process of a node has a ring of its own for its share, one where several groups lie on the node, whose processes
            of one share stand side by side
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qvgen.training.design.training_run import TrainingRun
from qvgen.training.planning.memory import MemoryPart
from qvgen.training.planning.network import BETWEEN_GROUPS, WEIGHTS


@dataclass(frozen=True, kw_only=True)
class NodeTraffic:
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


def node_traffic(run: TrainingRun, parts: Sequence[MemoryPart]) -> NodeTraffic | None:
    """What a run's steps send from each node; None on one node.

    Args:
        run: What is planned.
        parts: What each device sends in a step (:func:`qvgen.training.planning.network.network_parts`).
    """
    if run.num_nodes == 1:
        return None
    leaves_node = not run.is_sharded or run.shards > run.node_devices
    gathered = gradients = 0
    for part in parts:
        if part.name == BETWEEN_GROUPS:
            gradients += part.nbytes * min(run.node_devices, run.shards)
        elif leaves_node and part.name in WEIGHTS:
            gathered += part.nbytes
        elif leaves_node:
            gradients += part.nbytes
    return NodeTraffic(gathered_bytes=gathered, gradient_bytes=gradients)
