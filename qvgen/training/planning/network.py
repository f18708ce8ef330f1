"""The traffic of an optimizer step: bytes that each device sends to the others, and receives from them, by part.

R processes share a model of P bytes out, of which each trains G bytes of gradients; T are the teacher's. Each part goes to
R - 1 of R places, whatever way a library takes through a network:

    fsdp, hsdp     a micro-batch      P forward, P backward, T, and G of gradients, each times (R - 1) / R
                   a step of hsdp     2 G / R (D - 1) / D between D groups, after each micro-batch too
    ddp            a step             2 G (W - 1) / W over all W processes
    deepspeed      see :mod:`qvgen.training.planning.zero_memory`

A share is as large as the largest one: FSDP2 fills shorter ones up. With ``strategy.gather=codes`` P is smaller in the
forward pass. With ``strategy.cpu_offload`` a share of all that is gathered comes from the host besides, and one of the
gradients goes there.

Left out: losses, norms and the halving of Phi, which are small or rare; the latency of each collective.
"""

from __future__ import annotations

from torch import nn

from qvgen.layers.swap import quantized_layers
from qvgen.training.design.training_run import TrainingRun
from qvgen.training.distributed.codes_gather import code_bytes, sends_codes
from qvgen.training.planning.memory import MemoryPart, share_bytes
from qvgen.training.planning.stored_state import share_numel, trained
from qvgen.training.planning.zero_memory import AFTER_STEP, zero_traffic

FORWARD, BACKWARD, OF_TEACHER = "student's weights, forward", "student's weights, backward", "teacher's weights"
WEIGHTS = (FORWARD, BACKWARD, OF_TEACHER, AFTER_STEP)
BETWEEN_GROUPS = "gradients, between groups"
"""Names of parts; all others are gradients too."""


def network_parts(run: TrainingRun, student: nn.Module, *, teacher: nn.Module | None) -> list[MemoryPart]:
    """Bytes that each device receives in an optimizer step; it sends as many.

    Args:
        run: What is planned.
        student: On the meta device, of one type throughout where it is shared out.
        teacher: On the meta device; None for a method without one.
    """
    if run.devices == 1:
        return []
    if run.strategy.name == "deepspeed":
        return _parts(zero_traffic(run, student))
    if not run.is_sharded:
        gradients = sum(parameter.nbytes for parameter in trained(student))
        return _parts({"gradients, averaged": 2 * gradients * (run.devices - 1) // run.devices})
    times, shards, again = run.steps.batch.num_micro_batches, run.shards, run.strategy.reshard_after_forward
    groups = run.devices // shards
    share, gradients = share_bytes(student.parameters(), shards=shards), share_bytes(trained(student), shards=shards)
    frozen = 0 if teacher is None else share_bytes(teacher.parameters(), shards=shards)
    saved = saved_by_codes(student, shards=shards) if run.strategy.gather == "codes" else 0
    sizes = {
        FORWARD: times * (share - saved) * (shards - 1),
        BACKWARD: times * _backward_bytes(share * shards, again, shards=shards),
        OF_TEACHER: times * frozen * (shards - 1),
        "gradients, shared out": times * gradients * (shards - 1),
        BETWEEN_GROUPS: times * 2 * gradients * (groups - 1) // groups,
    }
    return _parts(sizes)


def saved_by_codes(student: nn.Module, *, shards: int) -> int:
    """Bytes by which a share is shorter where codes stand for weights."""
    layers = [layer for layer in quantized_layers(student).values() if sends_codes(layer)]
    sizes = [(share_numel(layer.weight.shape, shards=shards), layer.profile.weight.bits) for layer in layers]
    return sum(4 * numel - code_bytes(bits, numel) for numel, bits in sizes)


def host_traffic(run: TrainingRun, student: nn.Module, *, teacher: nn.Module | None) -> int:
    """Bytes that go between a device and its host in an optimizer step because shares lie there; 0 where they do not."""
    if not run.strategy.cpu_offload:
        return 0
    shares = share_bytes(student.parameters(), shards=run.shards)
    passes = 2 if run.strategy.reshard_after_forward is True else 1  # what is kept of a block lies on the device
    frozen = 0 if teacher is None else share_bytes(teacher.parameters(), shards=run.shards)
    gradients = share_bytes(trained(student), shards=run.shards)
    return run.steps.batch.num_micro_batches * (passes * shares + frozen + gradients)


def _backward_bytes(nbytes: int, again: bool | int, *, shards: int) -> int:
    """What gathering for the backward pass brings, of so many bytes: nothing where they are there."""
    parts = (shards if again else 1) if isinstance(again, bool) else again
    return nbytes * (parts - 1) // parts


def _parts(sizes: dict[str, int]) -> list[MemoryPart]:
    return [MemoryPart(name=name, nbytes=nbytes) for name, nbytes in sizes.items() if nbytes]
