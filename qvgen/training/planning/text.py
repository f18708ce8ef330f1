"""A plan as lines of text that a person reads at a glance."""

from __future__ import annotations

import math
from collections.abc import Sequence

from qvgen.training.planning.advice import SHARDED_DEVICES
from qvgen.training.planning.layer_table import LayerGroup
from qvgen.training.planning.memory import USABLE_SHARE, total_bytes
from qvgen.training.planning.training_plan import TrainingPlan

_REFERENCE_SPEED = 1e14
"""Operations per second that a time is named for where nothing can be measured."""


def format_plan(plan: TrainingPlan, *, title: str, network_gbits: float | None = None) -> list[str]:
    """All lines.

    Args:
        plan: The plan.
        title: What is planned, for people.
        network_gbits: Speed of each node's network in Gbit/s; None: not known.
    """
    return [
        f"plan of {title}",
        *_layers("quantized", plan.quantized),
        *_layers("skipped", plan.skipped),
        *_parameters(plan),
        *_schedule(plan),
        *_memory(plan),
        *_work(plan),
        *_network(plan, network_gbits),
        *_disk(plan),
        *verdict(plan),
    ]


def format_bytes(count: float) -> str:
    """Bytes in the largest binary unit that leaves at least one.

    Example:
        >>> format_bytes(0), format_bytes(1536), format_bytes(41 * 2**30), format_bytes(3000 * 2**30)
        ('0 B', '1.5 KiB', '41.0 GiB', '3000.0 GiB')
    """
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} B"


def format_count(count: float) -> str:
    """A large number in 10^9, 10^6 or as it is.

    Example:
        >>> format_count(1_693_940_160), format_count(65_000), format_count(50)
        ('1.694 x 10^9', '0.065 x 10^6', '50')
    """
    for power, size in ((9, 1e9), (6, 1e6)):
        if count >= 0.05 * size:
            return f"{count / size:.3f} x 10^{power}"
    return f"{count:.0f}"


def format_flops(count: float) -> str:
    """Operations with a unit.

    Example:
        >>> format_flops(637e12), format_flops(4.29e18), format_flops(2.8e8)
        ('0.637 PFLOP', '4.290 EFLOP', '0.280 GFLOP')
    """
    unit, size = next(
        (unit, size) for unit, size in (("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 0.0)) if count >= 0.05 * size
    )
    return f"{count / (size or 1e9):.3f} {unit}FLOP"


def format_seconds(seconds: float) -> str:
    """A time span.

    Example:
        >>> format_seconds(42), format_seconds(600), format_seconds(86400), format_seconds(1e6), format_seconds(1e9)
        ('42 s', '10 minutes', '24.0 hours', '11.6 days', 'more than a year')
    """
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} minutes"
    if seconds < 200_000:
        return f"{seconds / 3600:.1f} hours"
    return f"{seconds / 86400:.1f} days" if seconds < 366 * 86400 else "more than a year"


def _layers(title: str, groups: Sequence[LayerGroup]) -> list[str]:
    if not groups:
        return [f"{title}: no Linear"]
    width = max(len(group.pattern) for group in groups)
    number = sum(group.count for group in groups)
    weights = sum(group.weights for group in groups)
    lines = [f"{title}: {number} Linears, {format_count(weights)} weights (out x in)"]
    for group in groups:
        shape = f"{group.out_features}x{group.in_features}"
        lines.append(f"  {group.pattern:<{width}}  x{group.count:<3} {shape}")
    return lines


def _parameters(plan: TrainingPlan) -> list[str]:
    total = sum(group.parameters for group in plan.parameters)
    lines = [f"trained: {format_count(total)} parameters"]
    for group in plan.parameters:
        lines.append(
            f"  {group.name:<16}  {format_count(group.parameters):>14} in {group.tensors} tensors, "
            f"learning rate {group.learning_rate:g}, weight decay {group.weight_decay:g}"
        )
    return lines


def _schedule(plan: TrainingPlan) -> list[str]:
    schedule = plan.schedule
    groups = f"{schedule.devices} devices"
    if schedule.context > 1:
        groups = f"{schedule.devices // schedule.context} groups of {schedule.context} devices that share tokens out"
    lines = [
        f"steps: {schedule.steps} of {schedule.batch_size} samples = {groups} x "
        f"{schedule.micro_batches} micro-batches x {schedule.micro_batch}; {schedule.recipe}"
    ]
    if plan.num_clips:
        lines[0] += f"; {plan.samples / plan.num_clips:.1f} epochs of {plan.num_clips} clips"
    if schedule.phases:
        shown = ", ".join(f"{rank} from step {step}" for rank, step in schedule.phases)
        kept = ", which stays as a branch" if schedule.phi_keep else ""
        lines.append(f"  rank of Phi: {shown}{kept}")
    return lines


def _memory(plan: TrainingPlan) -> list[str]:
    total, width = plan.memory_bytes, max(len(part.name) for part in plan.memory)
    clip = " x ".join(map(str, plan.clip))
    checkpointing = "on" if plan.gradient_checkpointing else "off"
    checkpointing += ", outputs of attention kept" if plan.keep_attention else ""
    lines = [
        f"memory of each device: {plan.schedule.micro_batch} x {clip} at once, {plan.precision}, "
        f"gradient checkpointing {checkpointing}"
    ]
    for part in plan.memory:
        lines.append(f"  {part.name:<{width}}  {format_bytes(part.nbytes):>10}  {part.nbytes / total:4.0%}")
    lines.append(
        f"  {'sum':<{width}}  {format_bytes(total):>10}  of {format_bytes(plan.device.nbytes)}, {plan.device.name}"
    )
    if plan.host_parts:
        kept = ", ".join(f"{part.name} {format_bytes(part.nbytes)}" for part in plan.host_parts)
        lines.append(f"host memory while it trains: {kept}")
    left = f"this host has {format_bytes(plan.host_available_bytes)} left"
    if plan.shards > 1:
        what = "student, teacher and layers that are set up, or teacher and the shares of a checkpoint that is written"
        where, key = "the first node", "with strategy.low_host_memory=true"
        other = plan.host.otherwise
        assert other is not None, "a plan of a model that is shared out has both"
        if plan.host.is_low:
            what = "layers that are set up, one by each process, or the shares of a checkpoint that is written"
            where, key = "each node", "without strategy.low_host_memory"
        sizes, others = (
            f"{format_bytes(host.needed)}, {format_bytes(host.start)} at the start" for host in (plan.host, other)
        )
        return [*lines, f"host memory of {where}: {sizes} ({what}); {left}", f"  {key}: {others}"]
    here = plan.schedule.devices // plan.schedule.nodes
    each = f", {here} processes together" if here > 1 else ""
    what = "student while its layers are swapped, or student and teacher; layers that are set up"
    when = "" if plan.host_parts else " before training"
    what += ", or what stays there" if plan.host_parts else ""
    return [*lines, f"host memory{when}: {format_bytes(plan.host.needed)}{each} ({what}); {left}"]


def _work(plan: TrainingPlan) -> list[str]:
    count, batch = plan.count, plan.schedule.micro_batch
    per_sample = count.flops / batch
    parts = {
        "teacher": count.teacher_flops,
        "student": count.student_flops,
        "recompute": count.recompute_flops,
        "backward": count.backward_flops,
    }
    shown = ", ".join(f"{name} {format_flops(flops / batch)}" for name, flops in parts.items() if flops)
    attention = count.attention_flops / count.flops
    forward = count.forward_attention_flops / count.student_flops
    lines = [
        f"work: {format_flops(per_sample)} per sample ({shown}); attention {attention:.0%} of it, {forward:.0%} of the "
        "student's forward pass",
        f"  whole run: {plan.samples} samples, {format_flops(per_sample * plan.samples)}",
    ]
    return [*lines, *_time(plan, per_sample * plan.samples)]


def _time(plan: TrainingPlan, flops: float) -> list[str]:
    estimate = plan.time
    if estimate.seconds is None:
        seconds = flops / (_REFERENCE_SPEED * plan.schedule.devices)
        return [
            f"time (an estimate): {format_seconds(seconds)} on {plan.schedule.devices} devices that sustain "
            f"{_REFERENCE_SPEED / 1e12:g} TFLOP/s each; that device is not here to be measured"
        ]
    speeds = ", ".join(
        f"{speed / 1e12:.3g} TFLOP/s in {name.removeprefix('torch.')}"
        for name, speed in estimate.flops_per_second.items()
    )
    return [
        f"time (an estimate): {format_seconds(estimate.seconds)}, from matrix products measured here ({speeds}) at an "
        f"assumed {estimate.efficiency:.0%} of that speed; loading, validation and the report come on top"
    ]


def _network(plan: TrainingPlan, gbits: float | None) -> list[str]:
    if not plan.network:
        return []
    parts = ", ".join(f"{part.name} {format_bytes(part.nbytes)}" for part in plan.network)
    lines = [f"network (predicted): each device receives {format_bytes(total_bytes(plan.network))} a step ({parts})"]
    if plan.host_traffic_bytes:
        lines.append(f"  between each device and its host: {format_bytes(plan.host_traffic_bytes)} a step")
    if (traffic := plan.node_network) is None:
        return lines
    sizes = {"weights": traffic.gathered_bytes, "gradients": traffic.gradient_bytes}
    shown = ", ".join(f"{name} {format_bytes(nbytes)}" for name, nbytes in sizes.items() if nbytes)
    line = f"  each of {plan.schedule.nodes} nodes sends and receives {format_bytes(traffic.nbytes)} a step ({shown})"
    if gbits is None:
        return [*lines, f"{line}; write network_gbits=SPEED for its time"]
    seconds = traffic.seconds(gbits)
    whole = format_seconds(plan.schedule.steps * seconds)
    timed = (
        f"{seconds:.3g} s a step at {gbits:g} Gbit/s, {whole} of the whole run if none of it goes on beside computing"
    )
    return [*lines, f"{line}; {timed}"]


def _disk(plan: TrainingPlan) -> list[str]:
    width = max(len(part.name) for part in plan.disk)
    lines = ["disk:"]
    for part in plan.disk:
        lines.append(f"  {part.name:<{width}}  {format_bytes(part.nbytes):>10}  {part.note}")
    return lines


def verdict(plan: TrainingPlan) -> list[str]:
    """Whether it fits, and what would make it fit."""
    usable = f"{format_bytes(plan.device.usable_bytes)} ({USABLE_SHARE:.0%} of {format_bytes(plan.device.nbytes)})"
    host = []
    if plan.host_is_short:
        host = [
            f"HOST MEMORY IS SHORT: {format_bytes(plan.host.needed)} are needed, "
            f"{format_bytes(plan.host_available_bytes)} are left on this host"
        ]
    if plan.disk_is_short:
        host.append(
            f"DISK IS SHORT: {format_bytes(plan.run_bytes)} are needed for the run's folder, "
            f"{format_bytes(plan.disk_available_bytes)} are free on this host"
        )
    if plan.fits:
        return [f"fits: {format_bytes(plan.memory_bytes)} of {usable}", *host]
    largest = max(plan.memory, key=lambda part: part.nbytes)
    lines = [
        f"DOES NOT FIT: {format_bytes(plan.memory_bytes)} of {usable}; the largest part is {largest.name}, "
        f"{format_bytes(largest.nbytes)}"
    ]
    for change in plan.changes:
        lines.append(f"  would fit: {change.overrides}  ({format_bytes(change.total_bytes)})")
    if not plan.changes:
        assert plan.needed_bytes is not None
        needed = math.ceil(plan.needed_bytes / 2**30)
        shared = "strategy=fsdp shares a model out over GPUs"
        if plan.device.on_gpu:
            shared = f"sharing the model out over {max(SHARDED_DEVICES)} GPUs (strategy=fsdp) is not enough either"
        lines.append(
            f"  nothing that can be set makes it fit: each device needs {needed} GiB even with gradient checkpointing, "
            f"micro-batches of 1, a bfloat16 teacher and moments and teacher on the host; {shared}"
        )
    if not plan.device.on_gpu:
        lines.append("  this is a plan for the CPU; write device_memory_gib=80 to plan for a GPU of 80 GiB")
    return [*lines, *host]
