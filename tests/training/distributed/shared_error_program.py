"""A program in which four processes measure the error of one model together; run by test_shared_error.py.

`shared_error_program.py FOLDER` writes FOLDER/RANK.json in each of them: for each way of holding the model and each number of
batches the error, as hexadecimal digits, and how often the process called the model; the same of its outputs.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh

from qvgen.evaluation.held_out import MeasuredInputs
from qvgen.stop_request import Stopped
from qvgen.training.distributed.gathering import Gathering, gather_by_block_
from qvgen.training.shared_error import SharedError, SharedOutputs, read_reference, write_reference
from tests.training.distributed.gathering_program import Blocks

COUNTS = (1, 3, 5)
"""Batches: fewer than processes, and one more."""
MESHES = {"ddp": None, "fsdp": (4,), "hsdp": (2, 2)}
STOPPED = 2
"""The rank that is asked to stop."""


class Inputs(MeasuredInputs):
    """Batches of other sizes and values each."""

    def __init__(self, count: int) -> None:
        draws = torch.Generator().manual_seed(count)
        self.batches = [torch.randn(1 + index % 3, 8, generator=draws) for index in range(count)]
        self.num_batches, self.num_samples, self.batch_size = count, sum(map(len, self.batches)), 3
        self.calls = 0

    @torch.no_grad()
    def predictions(self, model: nn.Module, batches: Iterable[int] | None = None) -> Iterator[Tensor]:
        for number in range(self.num_batches) if batches is None else batches:
            self.calls += 1
            yield model(self.batches[number])


def models() -> tuple[nn.Module, nn.Module]:
    """The model that is measured, and the reference's."""
    torch.manual_seed(0)
    return Blocks(), Blocks()


def held(mesh: tuple[int, ...] | None, *, reference: bool = False) -> nn.Module:
    model = models()[reference]
    if mesh is not None:
        names = ("replicate", "shard")[-len(mesh) :]
        shared = init_device_mesh("cpu", mesh, mesh_dim_names=names)
        gather_by_block_(model, blocks=list(model.blocks), mesh=shared, how=Gathering())
    return model


def look(folder: Path) -> dict[str, Any]:
    """Errors and calls of this process."""
    found: dict[str, Any] = {}
    for way, mesh in MESHES.items():
        model = held(mesh)
        for count in COUNTS:
            inputs = Inputs(count)
            if distributed.get_rank() == 0:
                write_reference(folder, list(inputs.predictions(models()[1])), key="0")
            distributed.barrier()
            inputs.calls = 0
            error = SharedError(inputs, reference=read_reference(folder), together=mesh is not None)(model)
            found[f"{way} {count}"] = [error.hex(), inputs.calls]
            if mesh is not None:  # no process has a whole model
                alone = SharedError(inputs, reference=None, together=True)
                alone.take_reference_of(held(mesh, reference=True))
                found[f"{way} {count} streamed"] = [alone(model).hex(), alone(model).hex()]
                inputs.calls = 0
                outputs = SharedOutputs(inputs)
                outputs.compute(model)
                values = None if outputs.found is None else [value.tolist() for value in outputs.found]
                found[f"{way} {count} outputs"] = [values, inputs.calls]
    return found


def is_stopped(folder: Path) -> bool:
    """Whether this process ends its measurement where another one is asked to stop, which it learns behind its own part."""

    def refuse(*_: object) -> None:
        if distributed.get_rank() == STOPPED:
            raise Stopped

    model = models()[0]
    model.register_forward_pre_hook(refuse)
    try:
        SharedError(Inputs(max(COUNTS)), reference=read_reference(folder), together=False)(model)
    except Stopped:
        return True
    return False


def main() -> None:
    folder, rank = Path(sys.argv[1]), 0
    children: list[int] = []
    while rank == 0 and len(children) < 3:  # forked: torch is imported once
        place = len(children) + 1
        child = os.fork()
        rank, children = (place, []) if child == 0 else (0, [*children, child])
    distributed.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=4)
    found = {**look(folder), "stopped": is_stopped(folder)}
    (folder / f"{rank}.json").write_text(json.dumps(found))
    distributed.destroy_process_group()
    if any(os.waitpid(child, 0)[1] for child in children):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
