"""A program in which two processes train low-rank factors with DeepSpeed and halve their rank; run by test_deepspeed.py.

`deepspeed_program.py FOLDER` prints a JSON list: for each process what it found with ZeRO-2. The factors
L [N, r] and R [r, K] are those of Phi, and the halving is :func:`qvgen.lowrank.svd.refactor`, read and written by
DeepSpeed's accessors of its float32 masters. The learning rate is 0 in the steps around the halving: what an optimizer step
does not write back is seen to the bit. DeepSpeed's shared-memory operator for CPUs, which it compiles in a folder of the
user's, is left out.
"""

from __future__ import annotations

import json
import os
import sys
from importlib import import_module
from pathlib import Path

import deepspeed
import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_set_full_fp32_param
from torch import Tensor, nn

from qvgen.lowrank.svd import refactor
from qvgen.training.distributed.child_command import free_port

ROWS, COLUMNS, RANK = 24, 16, 4


class LowRank(nn.Module):
    """A product of two factors, as Phi adds it to a layer."""

    def __init__(self) -> None:
        super().__init__()
        draws = torch.Generator().manual_seed(0)
        self.left = nn.Parameter(torch.randn(ROWS, RANK, generator=draws))
        self.right = nn.Parameter(torch.randn(RANK, COLUMNS, generator=draws))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.right.mT @ self.left.mT


def engine_of() -> object:
    model = LowRank()
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 2},
        "zero_allow_untested_optimizer": True,
    }
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=settings)[0]


def step(engine: object, *, rate: float) -> None:
    for group in engine.optimizer.param_groups:
        group["lr"] = rate
    draws = torch.Generator().manual_seed(deepspeed.comm.get_rank())
    loss = engine(torch.randn(4, COLUMNS, generator=draws)).square().mean()
    engine.backward(loss)
    engine.step()


def halve(engine: object) -> tuple[Tensor, Tensor]:
    """Keep half of the rank, by the accessors; what was written."""
    parts = engine.module.left, engine.module.right
    left, right = (safe_get_full_fp32_param(part).clone() for part in parts)
    half = RANK // 2
    new_left, new_right = torch.zeros_like(left), torch.zeros_like(right)
    new_left[:, :half], new_right[:half] = refactor(left, right, rank=half)
    for part, value in zip(parts, (new_left, new_right), strict=True):
        safe_set_full_fp32_param(part, value)
    return new_left, new_right


def look() -> dict[str, bool]:
    """What an engine does with both ways to write."""
    engine = engine_of()
    step(engine, rate=1e-2)
    left = engine.module.left
    before = safe_get_full_fp32_param(left).clone()
    with torch.no_grad():
        left.mul_(0.5)  # in place, without DeepSpeed being told
    step(engine, rate=0.0)
    is_lost = torch.equal(safe_get_full_fp32_param(left), before)
    written = halve(engine)
    at_once = [safe_get_full_fp32_param(part) for part in (left, engine.module.right)]
    step(engine, rate=0.0)
    later = [safe_get_full_fp32_param(part) for part in (left, engine.module.right)]
    return {
        "an in-place write is lost": is_lost,
        "read back at once": all(map(torch.equal, at_once, written)),
        "read back after a step": all(map(torch.equal, later, written)),
        "the forward pass has it": torch.equal(left.float(), written[0]),
    }


def main() -> None:
    folder, port, rank = Path(sys.argv[1]), free_port(), 0
    child = os.fork()
    rank = int(child == 0)
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    import_module("deepspeed.comm.torch").build_shm_op = lambda: None  # as an attribute the name is that of torch
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
    (folder / f"{rank}.json").write_text(json.dumps(look()))
    torch.distributed.destroy_process_group()
    if rank:
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        raise SystemExit("rank 1 failed")
    print(json.dumps([json.loads((folder / f"{number}.json").read_text()) for number in range(2)]))


if __name__ == "__main__":
    main()
