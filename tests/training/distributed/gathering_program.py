"""A program in which four processes gather the blocks of a small model in several ways; run by test_gathering.py.

`gathering_program.py FOLDER` writes FOLDER/RANK.json in each of them: for each way, whether all numbers are those of the same
model without shares, and the bytes that came to the process.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from qvgen.training.distributed.gathering import Gathering, gather_by_block_

WAYS = {
    "again": Gathering(),
    "ahead": Gathering(prefetch=2),
    "kept": Gathering(reshard_after_forward=False),
    "halves": Gathering(reshard_after_forward=2, prefetch=1),
    "on the host": Gathering(on_host=True),
}


class Blocks(nn.Module):
    """Four blocks and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x).tanh()
        return self.head(x)


def numbers(model: nn.Module) -> list[Tensor]:
    """Outputs and weights around two steps, with a call without gradients before weights are written."""
    x, found = torch.linspace(-1, 1, 24).reshape(3, 8), []
    for _ in range(2):
        loss = model(x).square().mean()
        loss.backward()
        with torch.no_grad():
            found += [loss.detach(), model(x)]
            for parameter in model.parameters():
                parameter -= 0.1 * parameter.grad
                parameter.grad = None
            found.append(model(x))
    whole = [p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters()]
    return [*found, *(value.detach().clone() for value in whole)]


def look(how: Gathering) -> dict[str, Any]:
    """One way against no shares."""
    torch.manual_seed(0)
    plain = Blocks()
    torch.manual_seed(0)
    model = Blocks()
    gather_by_block_(model, blocks=list(model.blocks), mesh=init_device_mesh("cpu", (4,)), how=how)
    received, gather = [], distributed.all_gather_single

    def counted(output: Tensor, given: Tensor, **options: Any) -> Any:
        received.append(output.nbytes - given.nbytes)
        return gather(output, given, **options)

    distributed.all_gather_single = counted
    model(torch.ones(1, 8)).sum().backward()
    distributed.all_gather_single = gather
    for parameter in model.parameters():
        parameter.grad = None
    same = all(torch.equal(a, b) for a, b in zip(numbers(model), numbers(plain), strict=True))
    return {"same": same, "received": sum(received), "shares": all(isinstance(p, DTensor) for p in model.parameters())}


def main() -> None:
    folder, rank = Path(sys.argv[1]), 0
    children = []
    while rank == 0 and len(children) < 3:  # forked: torch is imported once
        place = len(children) + 1
        child = os.fork()
        rank, children = (place, []) if child == 0 else (0, [*children, child])
    distributed.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=4)
    found = {name: look(how) for name, how in WAYS.items()}
    (folder / f"{rank}.json").write_text(json.dumps(found))
    distributed.destroy_process_group()
    if any(os.waitpid(child, 0)[1] for child in children):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
