"""What a training run will do, need and cost, before anything is loaded: what ``dry_run=true`` prints.

It needs no weights: the models are built on the meta device from the family's configuration, and a micro-batch runs on fake
tensors. docs/planning.md says how each number is got and what it leaves out.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from qvgen.config.schema import TrainConfig
from qvgen.training.meta_model import build_family, build_student
from qvgen.training.planning.advice import Change, clip_size, find_changes
from qvgen.training.planning.counted_step import StepSettings
from qvgen.training.planning.duration import TimeEstimate, estimate_time
from qvgen.training.planning.layer_table import DiskPart, LayerGroup, cache_files, collapse, free_bytes, run_files
from qvgen.training.planning.memory import (
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
from qvgen.training.planning.operation_counter import StepCount
from qvgen.training.session import micro_batch_size, micro_batches


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
        run_bytes: Files of the run's folder; the latent cache, which may be full already, is not among them.
        disk_available_bytes: What is free where that folder will be.
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
    run_bytes: int
    disk_available_bytes: int
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
    def host_is_short(self) -> bool:
        """Whether this host has less memory left than the run takes."""
        return self.host_bytes > self.host_available_bytes

    @property
    def disk_is_short(self) -> bool:
        """Whether less is free than the run's folder takes."""
        return self.run_bytes > self.disk_available_bytes

    @property
    def can_run(self) -> bool:
        """Whether all that is known of it fits; host and disk count where the device is this machine's."""
        return self.fits and not (self.device.is_here and (self.host_is_short or self.disk_is_short))

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
    files = run_files(config, student)
    changes, needed = [], None
    if total_bytes(memory) > device.usable_bytes:
        changes, needed = find_changes(config, settings, counter, usable_bytes=device.usable_bytes)
    return TrainingPlan(
        title=_title(config),
        quantized=collapse(student, swapped.quantized),
        skipped=collapse(student, swapped.skipped),
        parameters=_parameters(config, student),
        schedule=schedule,
        shards=shards,
        precision="bfloat16 autocast over float32 masters" if device.on_gpu else "float32",
        gradient_checkpointing=settings.gradient_checkpointing,
        clip=family.sample_shape,
        device=device,
        memory=memory,
        host_bytes=host_bytes(config, student),
        host_available_bytes=host_memory()[1],
        run_bytes=sum(part.nbytes for part in files),
        disk_available_bytes=free_bytes(config.run_dir),
        count=count,
        time=estimate_time(config, device, count, settings),
        disk=cache_files(config, family, num_clips=num_clips) + files,
        num_clips=num_clips,
        changes=changes,
        needed_bytes=needed,
    )


def _parameters(config: TrainConfig, student: nn.Module) -> list[ParameterGroup]:
    return [
        ParameterGroup(
            name=group["name"],
            tensors=len(group["params"]),
            parameters=sum(parameter.numel() for parameter in group["params"]),
            learning_rate=group["lr"],
            weight_decay=group["weight_decay"],
        )
        for group in config.method.parameter_groups(student, config.optim)
    ]


def _title(config: TrainConfig) -> str:
    names = config.names
    return (
        f"model={names.model} bits={config.bits.label} profile={names.profile} method={names.method} init={names.init} "
        f"data={names.data} strategy={config.strategy.name}"
    )


def _schedule(config: TrainConfig) -> Schedule:
    changing = config.method.schedule(config.phi, num_steps=config.steps)
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
        phases=() if changing is None else changing.phases,
        recipe=text,
    )
