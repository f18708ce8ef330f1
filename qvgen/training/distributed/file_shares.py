"""Shares of models that no process holds whole (``strategy.low_host_memory=true``): each rank reads its rows from files.

student    start.safetensors, rows of each tensor
teacher    the files of the model, and of its LoRAs, a tensor at a time, in the type that the teacher has when it is loaded
buffers    the student's that are stored: start.safetensors; those that a model computes when it is built (positions of
           tokens): the model without its blocks
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from qvgen.models.base import TensorReader, VideoDiT
from qvgen.models.tensor_reader import read_as
from qvgen.training.distributed.gathering import Gathering, gather_by_block_
from qvgen.training.distributed.sharding import blocks_of, read_rows_


def computed_buffers(family: VideoDiT) -> dict[str, Tensor]:
    """Buffers that a transformer computes when it is built and no file holds, on the CPU.

    Raises:
        ValueError: They lie in its blocks, so that a model without any does not have them.
    """
    with torch.device("meta"):
        whole = family.build(family.transformer_config)
    wanted = {name for name, _ in whole.named_buffers()} - whole.state_dict().keys()
    if not wanted:
        return {}
    with torch.random.fork_rng(devices=[]):
        frame = family.build({**family.transformer_config, "num_layers": 0})
    found = {name: buffer for name, buffer in frame.named_buffers() if name in wanted}
    if missing := sorted(wanted - found.keys()):
        raise ValueError(
            f"strategy.low_host_memory=true: {missing[0]} lies in a block and in no file; leave the key out"
        )
    return found


def share_student_(
    student: nn.Module,
    *,
    start: Path,
    computed: Mapping[str, Tensor],
    mesh: DeviceMesh,
    device: torch.device,
    how: Gathering,
) -> None:
    """Shard the student over a mesh and read this process's rows of it.

    Args:
        student: On the meta device, its layers as the start has them.
        start: The file of its tensors.
        computed: What :func:`computed_buffers` gives.
        mesh: The processes.
        device: Where this process computes.
        how: How blocks are gathered.
    """
    with safe_open(start, framework="pt") as content:
        stored = {name: content.get_tensor(name) for name, _ in student.named_buffers() if name not in computed}
        _share_(student, content.get_slice, {**stored, **computed}, mesh=mesh, device=device, how=how)


def share_teacher_(
    teacher: nn.Module,
    *,
    read: TensorReader,
    computed: Mapping[str, Tensor],
    mesh: DeviceMesh,
    device: torch.device,
    how: Gathering,
) -> None:
    """Shard the teacher, on the meta device in its own types, and read this process's rows; see :func:`share_student_`."""
    types = {name: parameter.dtype for name, parameter in teacher.named_parameters()}
    _share_(teacher, lambda name: read_as(read, name, types[name]), computed, mesh=mesh, device=device, how=how)


def _share_(
    model: nn.Module,
    value_of: Callable[[str], Any],
    buffers: Mapping[str, Tensor],
    *,
    mesh: DeviceMesh,
    device: torch.device,
    how: Gathering,
) -> None:
    gather_by_block_(model, blocks=blocks_of(model), mesh=mesh, how=how)
    names = [name for name, _ in model.named_buffers()]
    model.to_empty(device=torch.device("cpu") if how.on_host else device)
    read_rows_(model, value_of)
    for name in names:
        parent, _, leaf = name.rpartition(".")
        model.get_submodule(parent)._buffers[leaf] = buffers[name].to(device, copy=True)
