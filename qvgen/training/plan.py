"""What a training run will do, need and cost, before anything is loaded: what ``dry_run=true`` prints.

It needs no weights: the models are built on the meta device from the family's configuration, and a micro-batch runs on fake
tensors. docs/planning.md says how each number is got and what it leaves out.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

import torch

from qvgen.config.schema import TrainConfig
from qvgen.training.counted_step import StepSettings
from qvgen.training.fake_model import build_family, build_student
from qvgen.training.optim import parameter_groups
from qvgen.training.phi_plan import decay_schedule
from qvgen.training.plan_advice import Change, clip_size, find_changes
from qvgen.training.plan_layers import DiskPart, LayerGroup, cache_files, collapse, run_files
from qvgen.training.plan_memory import (
    Device,
    MemoryCounter,
    MemoryPart,
    activation_parts,
    find_device,
    host_bytes,
    host_memory,
    shards_of,
    teacher_dtype,
    total_bytes,
    weight_parts,
)
from qvgen.training.session import micro_batch_size, micro_batches
from qvgen.training.step_counter import StepCount

GPU_EFFICIENCY = 0.3
"""Share of the measured matrix product's speed that a step reaches on a GPU: assumed, no run was measured."""
CPU_EFFICIENCY = 0.15
"""The same on a CPU core: measured with model=tiny, whose small layers are mostly elementwise work."""

_MEASURED_SECONDS = 0.5


@dataclass(frozen=True, kw_only=True)
class ParameterGroup:
    """One group of the optimizer."""

    name: str
    tensors: int
    parameters: int
    learning_rate: float
    weight_decay: float


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How long a run is.

    Attributes:
        steps: Optimizer steps.
        batch_size: Samples per step, over all devices.
        devices: Processes.
        micro_batches: Of each process per step.
        micro_batch: Samples that a process works on at once.
        phases: (rank of Phi, first step with it); rank 0 is the tail. Empty without Phi.
        recipe: How steps and samples compare with the model's recipe.
    """

    steps: int
    batch_size: int
    devices: int
    micro_batches: int
    micro_batch: int
    phases: tuple[tuple[int, int], ...]
    recipe: str


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


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """The whole plan; see docs/planning.md.

    Attributes:
        title: What is run.
        quantized: Linears that are quantized.
        skipped: Linears that are not.
        parameters: Of the student, in groups of the optimizer.
        schedule: Steps and phases.
        shards: Devices over which parameters are shared out; 1: each holds all.
        precision: Of the forward pass.
        gradient_checkpointing: Whether blocks are computed again.
        clip: (C, F, H, W) of the largest samples.
        device: What trains.
        memory: Parts on each device.
        host_bytes: On the host, over all processes: before training, and of a sharded run also while it saves.
        host_available_bytes: What this host has left.
        count: Operations and bytes of one micro-batch.
        time: The estimate.
        disk: Files.
        num_clips: As given.
        changes: What would make it fit; empty if it fits, or if nothing would.
        needed_bytes: Memory that a device must have with everything that costs no quality; None if it fits.
    """

    title: str
    quantized: list[LayerGroup]
    skipped: list[LayerGroup]
    parameters: list[ParameterGroup]
    schedule: Schedule
    shards: int
    precision: str
    gradient_checkpointing: bool
    clip: tuple[int, int, int, int]
    device: Device
    memory: list[MemoryPart]
    host_bytes: int
    host_available_bytes: int
    count: StepCount
    time: TimeEstimate
    disk: list[DiskPart]
    num_clips: int | None
    changes: list[Change]
    needed_bytes: int | None

    @property
    def memory_bytes(self) -> int:
        """Sum of the parts."""
        return total_bytes(self.memory)

    @property
    def fits(self) -> bool:
        """Whether a device can hold it."""
        return self.memory_bytes <= self.device.usable_bytes

    @property
    def samples(self) -> int:
        """Samples of the whole run."""
        return self.schedule.steps * self.schedule.batch_size

    def to_json_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "memory_bytes": self.memory_bytes, "fits": self.fits, "samples": self.samples}


def plan_training(config: TrainConfig, *, num_clips: int | None = None) -> TrainingPlan:
    """Plan a run; reads no weights and writes nothing.

    Args:
        config: The run's, its leaves built.
        num_clips: Clips of the training data; None: not known.

    Raises:
        ValueError: What the run itself would refuse: patterns that match nothing, ranks or steps that do not fit.
    """
    schedule, device = _schedule(config), find_device(config)
    size = clip_size(config)
    family = build_family(config, size)
    student, swapped = build_student(config, family)
    own = {key: value for key, value in size.items() if value != getattr(config.model, key)}
    settings = StepSettings(
        micro_batch=schedule.micro_batch,
        gradient_checkpointing=config.strategy.gradient_checkpointing,
        autocast=device.on_gpu,
        teacher_dtype=teacher_dtype(family),
        model_changes=tuple(own.items()),
    )
    counter = MemoryCounter(config, student)
    count = counter.count(settings)
    shards = shards_of(config)
    memory = weight_parts(config, student, dtype=settings.teacher_dtype, shards=shards) + activation_parts(count)
    changes, needed = [], None
    if total_bytes(memory) > device.usable_bytes:
        changes, needed = find_changes(config, settings, counter, usable_bytes=device.usable_bytes)
    return TrainingPlan(
        title=_title(config),
        quantized=collapse(student, swapped.quantized),
        skipped=collapse(student, swapped.skipped),
        parameters=[
            ParameterGroup(
                name=group["name"],
                tensors=len(group["params"]),
                parameters=sum(parameter.numel() for parameter in group["params"]),
                learning_rate=group["lr"],
                weight_decay=group["weight_decay"],
            )
            for group in parameter_groups(student, config.optim)
        ],
        schedule=schedule,
        shards=shards,
        precision="bfloat16 autocast over float32 masters" if device.on_gpu else "float32",
        gradient_checkpointing=settings.gradient_checkpointing,
        clip=family.sample_shape,
        device=device,
        memory=memory,
        host_bytes=host_bytes(config, student),
        host_available_bytes=host_memory()[1],
        count=count,
        time=_time(config, device, count, settings),
        disk=cache_files(config, family, num_clips=num_clips) + run_files(config, student),
        num_clips=num_clips,
        changes=changes,
        needed_bytes=needed,
    )


def _title(config: TrainConfig) -> str:
    names = config.names
    return (
        f"model={names.model} bits={config.bits.label} profile={names.profile} method={names.method} init={names.init} "
        f"data={names.data} strategy={config.strategy.name}"
    )


def _schedule(config: TrainConfig) -> Schedule:
    decay = decay_schedule(config)
    phases = () if decay is None else tuple(zip((*decay.ranks, 0), decay.boundaries, strict=True))
    if phases and phases[-1][1] >= config.steps:  # no tail
        phases = phases[:-1]
    recipe = config.plain["model"].get("recipe") or {}
    steps, batch_size = recipe.get("steps", config.steps), recipe.get("batch_size", config.batch_size)
    if (config.steps, config.batch_size) == (steps, batch_size):
        text = "the model's recipe"
    else:
        share = config.steps * config.batch_size / (steps * batch_size)
        text = f"not the model's recipe of {steps} steps of {batch_size}: {share:.2g} of its samples"
    return Schedule(
        steps=config.steps,
        batch_size=config.batch_size,
        devices=config.devices,
        micro_batches=micro_batches(config),
        micro_batch=micro_batch_size(config),
        phases=phases,
        recipe=text,
    )


def _time(config: TrainConfig, device: Device, count: StepCount, settings: StepSettings) -> TimeEstimate:
    """Operations over measured speed; the teacher's in its own dtype."""
    efficiency = GPU_EFFICIENCY if device.on_gpu else CPU_EFFICIENCY
    if not device.is_here:
        return TimeEstimate(seconds=None, flops_per_second={}, efficiency=efficiency)
    student_dtype = torch.bfloat16 if device.on_gpu else torch.float32
    teacher = settings.teacher_dtype if count.teacher_flops else student_dtype
    speed = {str(dtype): matmul_speed(dtype, on_gpu=device.on_gpu) for dtype in {student_dtype, teacher}}
    one = count.teacher_flops / speed[str(teacher)] + (count.flops - count.teacher_flops) / speed[str(student_dtype)]
    seconds = config.steps * micro_batches(config) * one / efficiency
    return TimeEstimate(seconds=seconds, flops_per_second=speed, efficiency=efficiency)


def matmul_speed(dtype: torch.dtype, *, on_gpu: bool) -> float:
    """Operations per second of square matrix products on this machine, measured for half a second, threads as set."""
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
