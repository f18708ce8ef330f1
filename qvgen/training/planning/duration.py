"""How long a run takes, estimated: its counted operations over the speed of matrix products measured here."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from qvgen.training.planning.memory import Device
from qvgen.training.planning.operation_counter import StepCount

GPU_EFFICIENCY = 0.3
"""Share of the measured matrix product's speed that a step reaches on a GPU: assumed, no run was measured."""
CPU_EFFICIENCY = 0.15
"""The same on a CPU core: measured with model=tiny, whose small layers are mostly elementwise work."""

_MEASURED_SECONDS = 0.2


@dataclass(frozen=True, kw_only=True)
class TimeEstimate:
    """Hours of training; an estimate.

    Attributes:
        seconds: Of the whole run; None where the device is not here to be measured.
        flops_per_second: Of matrix products as measured, by dtype.
        efficiency: The assumed share of it.
    """

    seconds: float | None
    flops_per_second: dict[str, float]
    efficiency: float


def estimate_time(
    device: Device, count: StepCount, *, num_micro_batches: float, teacher_dtype: torch.dtype
) -> TimeEstimate:
    """Operations over measured speed; the teacher's in its own dtype.

    Args:
        device: What trains.
        count: Operations of one micro-batch.
        num_micro_batches: Micro-batches that each process goes through in the whole run; shared ones count by their share.
        teacher_dtype: Of the teacher's weights.
    """
    efficiency = GPU_EFFICIENCY if device.on_gpu else CPU_EFFICIENCY
    if not device.is_here:
        return TimeEstimate(seconds=None, flops_per_second={}, efficiency=efficiency)
    student_dtype = torch.bfloat16 if device.on_gpu else torch.float32
    teacher = teacher_dtype if count.teacher_flops else student_dtype
    speed = {str(dtype): matmul_speed(dtype, on_gpu=device.on_gpu) for dtype in {student_dtype, teacher}}
    one = count.teacher_flops / speed[str(teacher)] + (count.flops - count.teacher_flops) / speed[str(student_dtype)]
    seconds = num_micro_batches * one / efficiency
    return TimeEstimate(seconds=seconds, flops_per_second=speed, efficiency=efficiency)


def matmul_speed(dtype: torch.dtype, *, on_gpu: bool) -> float:
    """Operations per second of square matrix products on this machine, measured for a fifth of a second, threads as set."""
    size, device = (8192, "cuda") if on_gpu else (512, "cpu")
    left = torch.ones(size, size, dtype=dtype, device=device)
    right = torch.ones(size, size, dtype=dtype, device=device)

    def done() -> float:
        if on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter()

    left @ right  # the first one loads libraries
    began, products = done(), 0
    while (now := done()) - began < _MEASURED_SECONDS:
        left @ right
        products += 1
    return 2 * size**3 * products / (now - began)
