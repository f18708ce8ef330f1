"""A program that trains a tiny module on two processes through WorkerGroup, twice; run by test_launcher.py.

`ddp_program.py OUT` is rank 0, `ddp_program.py OUT --rank 1 ...` a worker. Each writes OUT/JOB-rankR.json.
"""

import json
import os
import sys
from argparse import ArgumentParser
from pathlib import Path

import lightning
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader

from qvgen.training.distributed.cluster import OneMachine
from qvgen.training.distributed.foreign_launcher import forget_ranks
from qvgen.training.distributed.launcher import WorkerGroup, follow_parent


class Line(lightning.LightningModule):
    """One weight; its gradient on rank r is r + 1, so the mean over two ranks is 1.5."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        return (self.weight * (self.global_rank + 1)).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1.0)


def train(out: Path, job: str, *, rank: int, world_size: int, port: int) -> None:
    cluster = OneMachine(rank=rank, world_size=world_size, port=port)
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=world_size,
        strategy=DDPStrategy(cluster_environment=cluster, process_group_backend="gloo"),
        max_steps=2,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = Line()
    trainer.fit(module, DataLoader(torch.zeros(8, 1), batch_size=2))
    result = {"rank": trainer.global_rank, "world_size": trainer.world_size, "weight": module.weight.item()}
    (out / f"{job}-rank{rank}.json").write_text(json.dumps(result))


def main() -> None:
    parser = ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("job", nargs="?")
    for name in ("rank", "world-size", "port", "parent", "beats"):
        parser.add_argument(f"--{name}", type=int)
    given = parser.parse_args()
    if given.rank is not None:
        follow_parent(given.parent, beats=given.beats)
        train(given.out, given.job, rank=given.rank, world_size=given.world_size, port=given.port)
        return
    forget_ranks(os.environ)
    for job in ("first", "second"):
        command = [sys.executable, __file__, str(given.out), job]
        with WorkerGroup(command, world_size=2, log_directory=given.out / job) as group:
            train(given.out, job, rank=0, world_size=2, port=group.port)


if __name__ == "__main__":
    main()
