"""The memory and the traffic of ``strategy=deepspeed``, from what DeepSpeed 0.19 does; an estimate, not measured.

P bytes of weights, of which G are trained, over R processes; with ``offload_optimizer`` what is stepped lies on the host:

    stage 2    P weights, G / R masters (a copy, though both are float32), G / R gradients, 2 G / R moments
    stage 3    P / R weights, and of those up to :data:`LIVE` numbers whole at once; the rest the same

Gradients go through buffers of a bucket each, two where they are sent while others are computed. A step receives G of
gradients for each micro-batch, and G of weights once (stage 2), or P twice for each micro-batch (stage 3), all times
(R - 1) / R. The teacher is whole on each device.
"""

from __future__ import annotations

from torch import nn

from qvgen.training.design.training_run import TrainingRun
from qvgen.training.distributed.zero_options import BUCKET, LIVE
from qvgen.training.planning.live_bytes import tensor_bytes
from qvgen.training.planning.stored_state import StoredState, trained

AFTER_STEP = "student's weights, after the step"


def zero_sizes(run: TrainingRun, student: nn.Module, *, stored: StoredState) -> dict[str, int]:
    """Bytes on each device of what is trained, by name; activations, buffers, average and teacher left out.

    Args:
        run: Whose strategy is ``deepspeed``.
        student: On the meta device.
        stored: Whether moments lie on the host.
    """
    parts, stage = run.devices, run.strategy.stage
    weights, gradients = tensor_bytes(student.parameters()), tensor_bytes(trained(student))
    sizes: dict[str, int] = {}
    if stage == 2:
        sizes["student: weights, float32"] = weights
    else:
        if not run.strategy.offload_parameters:
            sizes[f"student: weights, float32, 1/{parts}"] = -(-weights // parts)
        sizes["gathered: blocks that are used soon again"] = min(weights, 4 * LIVE)
    if not stored.moments_on_host:
        sizes[f"DeepSpeed: masters, float32, 1/{parts}"] = -(-gradients // parts)
        sizes[f"student: gradients, float32, 1/{parts}"] = -(-gradients // parts)
        sizes[f"optimizer: two moments, float32, 1/{parts}"] = -(-2 * gradients // parts)
    sizes["gathered: buckets of gradients"] = min(2 * gradients, 2 * 4 * BUCKET)
    return sizes


def zero_host_sizes(run: TrainingRun, student: nn.Module) -> dict[str, int]:
    """Bytes that the processes of a node together keep on its host of what DeepSpeed has, by name."""
    weights, gradients = (
        tensor_bytes(tensors) // run.num_nodes for tensors in (student.parameters(), trained(student))
    )
    sizes: dict[str, int] = {}
    if run.strategy.offload_parameters:
        sizes["weights"] = weights
    if run.strategy.offload_optimizer:
        sizes["masters, gradients and moments"] = 4 * gradients
    return sizes


def zero_host_traffic(run: TrainingRun, student: nn.Module) -> int:
    """Bytes that go between a device and its host in an optimizer step."""
    times, parts = run.steps.batch.num_micro_batches, run.devices
    weights, gradients = tensor_bytes(student.parameters()), tensor_bytes(trained(student))
    stepped = (times + 1) * gradients if run.strategy.offload_optimizer else 0  # gradients there, stepped weights back
    return (stepped + (2 * times * weights if run.strategy.offload_parameters else 0)) // parts


def zero_traffic(run: TrainingRun, student: nn.Module) -> dict[str, int]:
    """Bytes that each device receives in an optimizer step, by name."""
    times, others, parts = run.steps.batch.num_micro_batches, run.devices - 1, run.devices
    weights, gradients = tensor_bytes(student.parameters()), tensor_bytes(trained(student))
    if run.strategy.stage == 2:
        sent = {AFTER_STEP: gradients * others // parts}
    else:
        sent = {
            "student's weights, forward": times * weights * others // parts,
            "student's weights, backward": times * weights * others // parts,
        }
    return {**sent, "gradients, shared out": times * gradients * others // parts}
