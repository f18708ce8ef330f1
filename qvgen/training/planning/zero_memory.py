"""The memory and the traffic of ``strategy=deepspeed`` (ZeRO-2), from what DeepSpeed 0.19 does; an estimate, not measured.

Of P bytes of weights G are trained, over R processes. Each device has P of weights, and as shares G / R of masters (a copy,
though both are float32), G / R of gradients and 2 G / R of moments. Gradients go through buffers of a bucket each, two where
they are sent while others are computed. A step receives G of gradients for each micro-batch, and G of weights once, all
times (R - 1) / R. The teacher is whole on each device.
"""

from __future__ import annotations

from torch import nn

from qvgen.training.design.training_run import TrainingRun
from qvgen.training.distributed.zero_check import BUCKET
from qvgen.training.planning.live_bytes import tensor_bytes
from qvgen.training.planning.stored_state import trained

AFTER_STEP = "student's weights, after the step"


def zero_sizes(run: TrainingRun, student: nn.Module) -> dict[str, int]:
    """Bytes on each device of what is trained, by name; activations, buffers, average and teacher left out.

    Args:
        run: Whose strategy is ``deepspeed``.
        student: On the meta device.
    """
    parts, gradients = run.devices, tensor_bytes(trained(student))
    return {
        "student: weights, float32": tensor_bytes(student.parameters()),
        f"DeepSpeed: masters, float32, 1/{parts}": -(-gradients // parts),
        f"student: gradients, float32, 1/{parts}": -(-gradients // parts),
        f"optimizer: two moments, float32, 1/{parts}": -(-2 * gradients // parts),
        "gathered: buckets of gradients": min(2 * gradients, 2 * 4 * BUCKET),
    }


def zero_traffic(run: TrainingRun, student: nn.Module) -> dict[str, int]:
    """Bytes that each device receives in an optimizer step, by name."""
    times, others, parts = run.steps.batch.num_micro_batches, run.devices - 1, run.devices
    gradients = tensor_bytes(trained(student))
    return {
        AFTER_STEP: gradients * others // parts,
        "gradients, shared out": times * gradients * others // parts,
    }
