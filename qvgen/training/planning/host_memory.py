"""The memory that a run needs on its hosts, by what happens there; the devices' is :mod:`memory`.

    preparation   the student in float32 while its Linears are swapped, then student and teacher: rank 0's, or with
                  strategy=ddp every process's
    setting up    layers that a process works on at the same time, several copies of each: every process's
    checkpoint    a copy of the shares that a thread writes, with fsdp

With strategy.low_host_memory no process prepares a whole model, and each sets up one layer at a time.

Counted are tensors, as most of them are there at once. Left out: Python and the libraries (0.5 GiB of each process),
statistics of a calibration (``calibration.memory_gib``), a copy of what is trained while an average is measured, the data
loader, and pages of mapped files, which the system takes back. Measured: docs/distributed.md.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import nn

from qvgen.config.plain_json import whole
from qvgen.initializers.prepare import SCRATCH_PER_WEIGHT
from qvgen.layers.layer_threads import num_threads
from qvgen.layers.swap import quantized_layers
from qvgen.models.base import VideoDiT
from qvgen.models.named_family import NamedFamily
from qvgen.training.design.meta_model import build_student, build_teacher, num_blocks
from qvgen.training.design.student import StudentDesign
from qvgen.training.design.training_run import TrainingRun
from qvgen.training.distributed.layer_shares import balanced_shares, setup_costs
from qvgen.training.planning.counted_step import COUNTED_BLOCKS, continued
from qvgen.training.planning.live_bytes import LiveBytes, tensor_bytes
from qvgen.training.planning.memory import teacher_dtype
from qvgen.training.planning.stored_state import StoredState
from qvgen.training.records.keys import family_key
from qvgen.training.records.store import recorded
from qvgen.training.start.shared import COPIES_PER_WEIGHT

DECOMPOSED_PER_WEIGHT = 14
"""Bytes for each weight of a layer whose grid is searched and whose loss is decomposed: the loss in float32 and float64, and
thin factors (13 measured of Wan 14B's layers). Methods that compare several starts take more: svdquant 32; gptq 24 for each
number of [K, K] besides."""


def preparation_bytes(model: NamedFamily, design: StudentDesign) -> int:
    """Most bytes of tensors on the host at once before training starts, of a process that holds whole models.

    The order is that of ``qvgen train``: the student is loaded in float32, its Linears are swapped (the new layers copy
    their weights before the old ones go), then the teacher is loaded in its dtype.
    """
    found: int = recorded(
        lambda: {"kind": "preparation", "family": family_key(model.rebuild(), model.section), "design": design},
        read=lambda content: whole(content, "preparation"),
        find=lambda: _preparation_bytes(model, design),
        write=int,
    )
    return found


def _preparation_bytes(model: NamedFamily, design: StudentDesign) -> int:
    """Count with the model's own classes."""
    blocks = num_blocks(model.family)
    if blocks > COUNTED_BLOCKS[-1]:
        short = [_preparation(model.rebuild(), design, blocks=number) for number in COUNTED_BLOCKS]
        if (whole := continued(short, blocks=blocks)) is not None:
            return max(whole)
    return max(_preparation(model.rebuild(), design, blocks=blocks))


def _preparation(family: VideoDiT, design: StudentDesign, *, blocks: int) -> tuple[int, int]:
    """Most bytes while a student of so many blocks is prepared, and bytes of student and teacher."""
    with LiveBytes() as live:
        student, _ = build_student(family, design, blocks=blocks)
        peak, kept = live.peak, live.live
    if design.method.quantizes:
        teacher = build_teacher(family, dtype=teacher_dtype(family), blocks=blocks)
        kept += tensor_bytes([*teacher.parameters(), *teacher.buffers()])
    del student
    return peak, kept


def setup_bytes(student: nn.Module, *, rank: int, world_size: int, neighbours: int, one_by_one: bool = False) -> int:
    """Most bytes that a process takes, beside models, while it sets up its share of the layers for a PTQ start.

    Args:
        student: On the meta device.
        rank: The process; those above 0 hold no model and read their layers one by one.
        world_size: All processes.
        neighbours: Processes of a host: they share the cores of this machine, for want of another one to ask.
        one_by_one: Whether no process holds a model, and each sets up one layer at a time.
    """
    layers = quantized_layers(student)
    names = balanced_shares(setup_costs(layers, needs=()), world_size)[rank]
    sizes = [torch.empty(()).expand(layers[name].weight.shape) for name in names]
    threads = num_threads(sizes, scratch_per_weight=SCRATCH_PER_WEIGHT, neighbours=neighbours)
    threads = 1 if one_by_one else threads
    each = DECOMPOSED_PER_WEIGHT + (COPIES_PER_WEIGHT if rank or one_by_one else 0)
    return sum(sorted((each * size.numel() for size in sizes), reverse=True)[:threads])


def saved_bytes(student: nn.Module, *, stored: StoredState) -> int:
    """Bytes of a checkpoint's tensors, of which each process of a sharded run copies its share to its host."""
    whole = tensor_bytes([*student.parameters(), *student.buffers()])
    return whole + stored.moment_bytes(student) + stored.average_bytes(student)


@dataclass(frozen=True, kw_only=True)
class HostBytes:
    """Most bytes of tensors on a host at once, over all processes of a node.

    Attributes:
        needed: From the beginning of a run to its last checkpoint.
        start: Before training begins.
        is_low: Whether no process holds a whole model (``strategy.low_host_memory``).
        otherwise: The same with the other value of ``strategy.low_host_memory``; None where models are not shared out.
    """

    needed: int
    start: int
    is_low: bool = False
    otherwise: HostBytes | None = None


def host_bytes(run: TrainingRun, student: nn.Module, *, stored: StoredState, kept_bytes: int = 0) -> HostBytes:
    """Memory of a host at the start, and while a sharded run saves.

    Where models are sharded only rank 0 holds whole models, or no process does. Later rank 0 keeps the teacher, and the
    processes of one group copy their shares of a checkpoint to their hosts, from which threads write it.

    Args:
        run: What is planned.
        student: On the meta device.
        stored: Types and places of the run's state.
        kept_bytes: What lies there from the first step to the last.
    """
    preparation, devices = preparation_bytes(run.model, run.design), run.node_devices

    def share_of_all(*, one_by_one: bool) -> int:
        sizes = {"world_size": run.devices, "neighbours": devices}
        return sum(setup_bytes(student, rank=rank, **sizes, one_by_one=one_by_one) for rank in range(devices))

    start = preparation + share_of_all(one_by_one=False)
    if run.shards == 1:
        start = max(start, devices * preparation)
        return HostBytes(needed=max(start, kept_bytes), start=start)
    family = run.model.rebuild()
    teacher = (
        build_teacher(family, dtype=teacher_dtype(family), is_planned=True) if run.design.method.quantizes else None
    )
    kept = 0 if teacher is None else tensor_bytes([*teacher.parameters(), *teacher.buffers()])
    copied = saved_bytes(student, stored=stored) * min(devices, run.shards) // run.shards
    usual = HostBytes(needed=max(start, kept + copied + kept_bytes), start=start)
    start = share_of_all(one_by_one=True)
    low = HostBytes(needed=max(start, copied + kept_bytes), start=start, is_low=True)
    chosen, other = (low, usual) if run.strategy.low_host_memory else (usual, low)
    return replace(chosen, otherwise=other)
