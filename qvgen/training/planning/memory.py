"""The memory that a run needs, by part, and the memory that is there.

    masters, gradients, moments, teacher (:mod:`qvgen.training.planning.stored_state`), buffers: from the models on the meta
    device; with strategy=fsdp a share of each, and what is gathered. What the forward and backward pass keep alive: from
    :mod:`qvgen.training.planning.counted_step`.

Left out: temporaries of the optimizer step, which takes one tensor at a time when activations are gone; the CUDA context,
workspaces of libraries and fragmentation, for which ``USABLE_SHARE`` leaves room. The host's: :mod:`host_memory`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qvgen.training.blocks.teacher_offload import BLOCKS_ON_DEVICE
from qvgen.training.design.meta_model import build_teacher
from qvgen.training.design.training_run import TrainingRun
from qvgen.training.distributed.gathering import Gathering
from qvgen.training.distributed.sharding import blocks_of
from qvgen.training.planning.counted_step import StepSettings, count_step
from qvgen.training.planning.live_bytes import tensor_bytes
from qvgen.training.planning.operation_counter import StepCount
from qvgen.training.planning.stored_state import StoredState, sized_bytes
from qvgen.training.planning.zero_memory import zero_sizes

USABLE_SHARE = 0.92
"""Of a device's memory, assumed: the rest is for the CUDA context, workspaces and fragmentation."""

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class MemoryPart:
    """One line of the table."""

    name: str
    nbytes: int


@dataclass(frozen=True, kw_only=True)
class Device:
    """What trains.

    Attributes:
        name: For people.
        nbytes: Memory of one device; for processes that share a host, each one's share.
        on_gpu: Whether training has a GPU's precision.
        is_here: Whether it is this machine's, and can be measured.
    """

    name: str
    nbytes: int
    on_gpu: bool
    is_here: bool

    @property
    def usable_bytes(self) -> int:
        """What tensors may fill."""
        return int(USABLE_SHARE * self.nbytes)


def find_device(device_memory_gib: float | None, *, devices: int) -> Device:
    """The device that ``device_memory_gib`` describes, or this machine's, whose memory ``devices`` processes share."""
    if device_memory_gib is not None:
        name = f"a GPU of {device_memory_gib:g} GiB (device_memory_gib)"
        return Device(name=name, nbytes=int(device_memory_gib * GIB), on_gpu=True, is_here=False)
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        return Device(name=properties.name, nbytes=properties.total_memory, on_gpu=True, is_here=True)
    share = host_memory()[0] // devices
    name = "the CPU of this host" + (f", shared by {devices} processes" if devices > 1 else "")
    return Device(name=name, nbytes=share, on_gpu=False, is_here=True)


def host_memory() -> tuple[int, int]:
    """Bytes of this host's memory (or of its container's), all and available."""
    page = os.sysconf("SC_PAGE_SIZE")
    total = os.sysconf("SC_PHYS_PAGES") * page
    available = os.sysconf("SC_AVPHYS_PAGES") * page
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines())
        available = int(lines["MemAvailable"].split()[0]) * 1024  # what caches hold can be had too
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="utf-8").strip()
        total = min(total, int(limit)) if limit != "max" else total
    except (OSError, KeyError):  # not Linux, or no such group
        pass
    return total, min(available, total)


def teacher_dtype(family: Any) -> torch.dtype:
    """Of the weights that the family loads as the teacher; float32 for one that has no choice."""
    dtype: torch.dtype = getattr(torch, getattr(family, "dtype", "float32"))
    return dtype


def share_bytes(tensors: Iterable[Tensor], *, shards: int) -> int:
    """Bytes of the largest share of tensors that are cut along their rows."""
    return sized_bytes(tensors, lambda tensor: tensor.element_size(), shards=shards)


def gathered_bytes(student: nn.Module, how: Gathering | None = None) -> int:
    """Most bytes of whole parameters and gradients on a device at once, besides its shares; an estimate.

    From what torch 2.13's fully_shard does, not measured. In the backward pass of a block: its parameters, its gradients, the
    buffer that they are shared out from, and the buffer into which the next block is gathered (``prefetch`` of them). What is
    in no block (the root unit) is whole from the beginning of a pass to its end, parameters and gradients. Blocks that are
    kept for the backward pass are all whole when it begins, with the gradients of one and their buffer; of blocks that are
    kept in g shares there is a share of each besides.
    """
    how = how or Gathering()
    blocks = [tensor_bytes(block.parameters()) for block in blocks_of(student)]
    root = tensor_bytes(student.parameters()) - sum(blocks)
    if how.reshard_after_forward is False:
        return sum(blocks) + 2 * max(blocks) + 2 * root
    kept = 0 if how.reshard_after_forward is True else (sum(blocks) + root) // how.reshard_after_forward
    return kept + (3 + (how.prefetch or 1)) * max(blocks) + 2 * root


def weight_parts(
    student: nn.Module,
    *,
    teacher: nn.Module | None,
    dtype: torch.dtype,
    shards: int = 1,
    stored: StoredState | None = None,
) -> list[MemoryPart]:
    """What lies on every device from the first step to the last.

    Args:
        student: On the meta device.
        teacher: On the meta device; None for a method without one.
        dtype: Of the teacher's weights.
        shards: Over how many devices all but the buffers is shared out.
        stored: Types and places; None: float32 throughout, all of it on the device.
    """
    stored = stored or StoredState()
    share, on_host = "" if shards == 1 else f", 1/{shards}", stored.gathering.on_host
    sizes = {}
    if not on_host:
        sizes[f"student: {stored.masters} masters{share}"] = stored.master_bytes(student, shards=shards)
        sizes[f"student: gradients, {stored.gradients}{share}"] = stored.gradient_bytes(student, shards=shards)
    if not stored.moments_on_host:
        name = f"optimizer: two moments, {stored.moments_name}{share}"
        sizes[name] = stored.moment_bytes(student, shards=shards)
    if stored.has_average and not stored.average_on_host:
        sizes[f"average, float32{share}"] = stored.average_bytes(student, shards=shards)
    if teacher is not None and not on_host:
        what = f"blocks on the host, {BLOCKS_ON_DEVICE} of them here" if stored.teacher_on_host else "weights"
        name = f"teacher: {what}, {str(dtype).removeprefix('torch.')}{share}"
        sizes[name] = stored.teacher_bytes(teacher, shards=shards)
    sizes["student: buffers"] = tensor_bytes(student.buffers())
    if shards > 1:
        sizes[f"gathered: {stored.gathering}, buffers"] = gathered_bytes(student, stored.gathering)
    return [MemoryPart(name=name, nbytes=nbytes) for name, nbytes in sizes.items()]


def activation_parts(count: StepCount, *, context: int = 1) -> list[MemoryPart]:
    """What a micro-batch adds, at the moment when it is most, to each of the processes that share its tokens out."""
    share = "" if context == 1 else f", 1/{context}"
    kept, peak = (-(-nbytes // context) for nbytes in (count.kept_bytes, count.peak_bytes))
    return [
        MemoryPart(name=f"activations: kept for the backward pass{share}", nbytes=kept),
        MemoryPart(name=f"activations: more at the peak{share}", nbytes=peak - kept),
    ]


def total_bytes(parts: list[MemoryPart]) -> int:
    """Their sum."""
    return sum(part.nbytes for part in parts)


class MemoryCounter:
    """The sum of all parts for any settings, each counted once; the first count is checked.

    Args:
        run: What is planned.
        student: Its student on the meta device.
    """

    def __init__(self, run: TrainingRun, student: nn.Module) -> None:
        self.run, self.student, self.stored = run, student, StoredState.of(run, student)
        self._counts: dict[StepSettings, StepCount] = {}
        self._teachers: dict[torch.dtype, nn.Module] = {}

    def of_run(self, run: TrainingRun) -> MemoryCounter:
        """Count for a run that differs only in its strategy; what was counted already is used again."""
        other = MemoryCounter(run, self.student)
        other._counts, other._teachers = self._counts, self._teachers
        return other

    def count(self, settings: StepSettings) -> StepCount:
        """The micro-batch."""
        if settings not in self._counts:
            run = self.run
            self._counts[settings] = count_step(
                run.model, run.design, settings, optim=run.steps.optim, is_checked=not self._counts
            )
        return self._counts[settings]

    def weight_bytes(self, settings: StepSettings, *, shards: int, stored: StoredState | None = None) -> int:
        """All but activations, shared out over so many devices; ``stored`` stands in place of the run's own."""
        return total_bytes(self.weight_parts(settings, shards=shards, stored=stored))

    def weight_parts(
        self, settings: StepSettings, *, shards: int, stored: StoredState | None = None
    ) -> list[MemoryPart]:
        """All but activations, by part; ``shards`` is 1 for DeepSpeed's own sharing."""
        dtype = settings.teacher_dtype
        if self.run.strategy.name == "deepspeed" and shards == 1:
            return self._zero_parts(dtype, stored=stored or self.stored)
        return weight_parts(
            self.student, teacher=self.teacher(dtype), dtype=dtype, shards=shards, stored=stored or self.stored
        )

    def _zero_parts(self, dtype: torch.dtype, *, stored: StoredState) -> list[MemoryPart]:
        """See :mod:`qvgen.training.planning.zero_memory`; what DeepSpeed has no part in as with other strategies."""
        parts = weight_parts(self.student, teacher=self.teacher(dtype), dtype=dtype, stored=stored)
        others = [part for part in parts if part.name.startswith(("average", "teacher", "student: buffers"))]
        sizes = zero_sizes(self.run, self.student)
        return [*(MemoryPart(name=name, nbytes=nbytes) for name, nbytes in sizes.items()), *others]

    def teacher(self, dtype: torch.dtype) -> nn.Module | None:
        """The teacher on the meta device; None for a method without one."""
        if self.run.design.method.needs_teacher and dtype not in self._teachers:
            self._teachers[dtype] = build_teacher(self.run.model.rebuild(), dtype=dtype, is_planned=True)
        return self._teachers.get(dtype)

    def total(self, settings: StepSettings, *, shards: int, stored: StoredState | None = None) -> int:
        """Bytes of everything."""
        activations = activation_parts(self.count(settings), context=self.run.strategy.context_parallel)
        return self.weight_bytes(settings, shards=shards, stored=stored) + total_bytes(activations)

    def host_parts(self, settings: StepSettings) -> list[MemoryPart]:
        """What all processes of a node together keep on its host while they train."""
        found = self.stored.host_parts(self.student, teacher=self.teacher(settings.teacher_dtype))
        devices, shards = self.run.node_devices, self.run.shards
        return [MemoryPart(name=name, nbytes=devices * nbytes // shards) for name, nbytes in found.items()]
