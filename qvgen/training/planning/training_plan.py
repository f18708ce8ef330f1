"""What a training run will do, need and cost, before anything is loaded: what ``dry_run=true`` prints.

It needs no weights: the models are built on the meta device from the family's configuration, and a micro-batch runs on
tensors that nobody computes. docs/planning.md says how each number is got and what it leaves out.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qvgen.training.design.meta_model import Prepared, build_student
from qvgen.training.design.training_run import TrainingRun
from qvgen.training.loss.prediction_loss import freeze_the_rest_
from qvgen.training.planning.advice import Change, clip_size, find_changes
from qvgen.training.planning.counted_step import StepSettings
from qvgen.training.planning.duration import TimeEstimate, estimate_time
from qvgen.training.planning.host_memory import HostBytes, host_bytes
from qvgen.training.planning.layer_table import DiskPart, LayerGroup, cache_files, collapse, free_bytes, run_files
from qvgen.training.planning.memory import (
    Device,
    MemoryCounter,
    MemoryPart,
    activation_parts,
    find_device,
    host_memory,
    teacher_dtype,
    total_bytes,
)
from qvgen.training.planning.network import host_traffic, network_parts
from qvgen.training.planning.node_traffic import NodeTraffic, node_traffic
from qvgen.training.planning.operation_counter import StepCount
from qvgen.training.planning.optimizer_group import ParameterGroup, planned_groups


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How long a run is.

    Attributes:
        steps: Optimizer steps.
        batch_size: Samples per step, over all devices.
        devices: Processes.
        context: Of these, how many share a sample's tokens out.
        nodes: Machines that they are on.
        micro_batches: Of each process per step.
        micro_batch: Samples that a process works on at once.
        phases: (rank of Phi, first step with it); rank 0 is the tail. Empty without Phi.
        phi_keep: Whether the last one of these ranks stays in the packed layers.
        recipe: How steps and samples compare with the model's recipe.
    """

    steps: int
    batch_size: int
    devices: int
    context: int
    nodes: int
    micro_batches: int
    micro_batch: int
    phases: tuple[tuple[int, int], ...]
    phi_keep: bool
    recipe: str


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """The whole plan; see docs/planning.md.

    Attributes:
        quantized: Linears that are quantized.
        skipped: Linears that are not.
        parameters: Of the student, in groups of the optimizer.
        schedule: Steps and phases.
        shards: Devices over which parameters are shared out; 1: each holds all.
        precision: Of the forward pass.
        gradient_checkpointing: Whether blocks are computed again.
        keep_attention: Whether that is without their attention.
        clip: (C, F, H, W) of the largest samples.
        device: What trains.
        memory: Parts on each device.
        host_parts: What lies on the host, of all processes, while the steps are computed.
        network: What each device receives from the others in an optimizer step, by part; it sends as much.
        host_traffic_bytes: What goes between a device and its host in an optimizer step because shares lie there.
        host: On the host, over all processes: before training, and of a sharded run also while it saves.
        host_available_bytes: What this host has left.
        run_bytes: Files of the run's folder; the latent cache, which may be full already, is not among them.
        disk_available_bytes: What is free where that folder will be.
        count: Operations and bytes of one micro-batch.
        time: The estimate.
        node_network: What each node sends in a step; None: there is one node.
        disk: Files.
        num_clips: As given.
        changes: What would make it fit; empty if it fits, or if nothing would.
        needed_bytes: Memory that a device must have with everything that costs no quality; None if it fits.
    """

    quantized: list[LayerGroup]
    skipped: list[LayerGroup]
    parameters: list[ParameterGroup]
    schedule: Schedule
    shards: int
    precision: str
    gradient_checkpointing: bool
    keep_attention: bool
    clip: tuple[int, int, int, int]
    device: Device
    memory: list[MemoryPart]
    host_parts: list[MemoryPart]
    network: list[MemoryPart]
    host_traffic_bytes: int
    host: HostBytes
    host_available_bytes: int
    run_bytes: int
    disk_available_bytes: int
    count: StepCount
    time: TimeEstimate
    node_network: NodeTraffic | None
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
        return self.host.needed > self.host_available_bytes

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


def plan_training(
    run: TrainingRun,
    *,
    device_memory_gib: float | None = None,
    run_dir: Path = Path(),
    checkpoints_kept: int = 2,
    num_clips: int | None = None,
    student: Prepared | None = None,
    counter: MemoryCounter | None = None,
) -> TrainingPlan:
    """Plan a run; reads no weights, writes nothing, and raises what the run itself would.

    Args:
        run: The run.
        device_memory_gib: Memory in GiB of each device that will train; None: this machine's.
        run_dir: The folder that the run will write to, which need not be there; its disk is looked at.
        checkpoints_kept: How many of the newest checkpoints are kept there.
        num_clips: Clips of the training data; None: not known.
        student: Of :func:`qvgen.training.start.student_check.check_student`; None: it is built.
        counter: Of :func:`qvgen.training.planning.strategy_choice.choose_strategy`; None: it counts anew.
    """
    schedule, device = _schedule(run), find_device(device_memory_gib, devices=run.node_devices)
    family: Any = run.model.rebuild(clip_size(run))
    prepared, swapped = student or build_student(family, run.design, is_planned=True)
    freeze_the_rest_(prepared, method=run.design.method, optim=run.steps.optim)
    settings = step_settings(run, device)
    counter = MemoryCounter(run, prepared) if counter is None else counter.of_run(run)
    count, teacher = counter.count(settings), counter.teacher(settings.teacher_dtype)
    memory = counter.weight_parts(settings, shards=run.shards) + activation_parts(count, context=schedule.context)
    files = _files(run, counter, checkpoints_kept=checkpoints_kept)
    on_host, network = counter.host_parts(settings), network_parts(run, prepared, teacher=teacher)
    fits = total_bytes(memory) <= device.usable_bytes
    changes, needed = ([], None) if fits else find_changes(run, settings, counter, usable_bytes=device.usable_bytes)
    return TrainingPlan(
        quantized=collapse(prepared, swapped.quantized),
        skipped=collapse(prepared, swapped.skipped),
        parameters=planned_groups(run, prepared),
        schedule=schedule,
        shards=run.shards,
        precision=_precision(run, device),
        gradient_checkpointing=settings.gradient_checkpointing,
        keep_attention=settings.keep_attention,
        clip=family.sample_shape,
        device=device,
        memory=memory,
        host_parts=on_host,
        network=network,
        host_traffic_bytes=host_traffic(run, prepared, teacher=teacher),
        host=host_bytes(run, prepared, stored=counter.stored, kept_bytes=total_bytes(on_host)),
        host_available_bytes=host_memory()[1],
        run_bytes=sum(part.nbytes for part in files),
        disk_available_bytes=free_bytes(run_dir),
        count=count,
        time=_time(schedule, device, count, settings),
        node_network=node_traffic(run, network),
        disk=cache_files(run.data, family, num_clips=num_clips) + files,
        num_clips=num_clips,
        changes=changes,
        needed_bytes=needed,
    )


def _files(run: TrainingRun, counter: MemoryCounter, *, checkpoints_kept: int) -> list[DiskPart]:
    return run_files(
        counter.student,
        checkpoints_kept=checkpoints_kept,
        is_packed=run.design.method.quantizes,
        phi_kept_rank=run.design.phi_kept_rank,
        stored=counter.stored,
    )


def step_settings(run: TrainingRun, device: Device) -> StepSettings:
    """What one of the run's micro-batches depends on, for its largest clips."""
    own = {key: value for key, value in clip_size(run).items() if value != getattr(run.model.family, key)}
    return StepSettings(
        micro_batch=run.steps.batch.micro_batch_size,
        gradient_checkpointing=run.strategy.gradient_checkpointing,
        keep_attention=run.strategy.gradient_checkpointing and run.strategy.keep_attention,
        autocast=device.on_gpu,
        teacher_dtype=teacher_dtype(run.model.family),
        model_changes=tuple(own.items()),
        loss=run.steps.loss,
        masters=run.steps.optim.masters,
        gradients=run.steps.optim.gradients,
    )


def _precision(run: TrainingRun, device: Device) -> str:
    masters = run.steps.optim.masters
    if device.on_gpu:
        return f"bfloat16 autocast over {masters} masters"
    return "float32" if masters == "float32" else f"float32 over {masters} masters"


def _time(schedule: Schedule, device: Device, count: StepCount, settings: StepSettings) -> TimeEstimate:
    micro_batches = schedule.steps * schedule.micro_batches / schedule.context
    return estimate_time(device, count, num_micro_batches=micro_batches, teacher_dtype=settings.teacher_dtype)


def _schedule(run: TrainingRun) -> Schedule:
    num_steps, batch, recipe = run.steps.num_steps, run.steps.batch, run.model.recipe
    changing = run.design.schedule(num_steps)
    steps, size = recipe.get("steps", num_steps), recipe.get("batch_size", batch.size)
    if (num_steps, batch.size) == (steps, size):
        text = "the model's recipe"
    else:
        share = num_steps * batch.size / (steps * size)
        text = f"not the model's recipe of {steps} steps of {size}: {share:.2g} of its samples"
    return Schedule(
        steps=num_steps,
        batch_size=batch.size,
        devices=batch.devices,
        context=batch.context,
        nodes=run.num_nodes,
        micro_batches=batch.num_micro_batches,
        micro_batch=batch.micro_batch_size,
        phases=() if changing is None else changing.phases,
        phi_keep=run.design.phi_keep,
        recipe=text,
    )
