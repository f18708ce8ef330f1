"""Which samples belong to which optimizer step: a pure function of (seed, step), for any number of processes.

An epoch is a permutation of the data keyed by (seed, epoch); step k takes the k-th run of ``batch_size`` samples from it, the
rest of an epoch is left out. Micro-batch m of rank r takes a fixed cut of the step's samples, so that the same
samples make the same step whatever the cut is.

The sampler asks for the first step when its iteration begins: a resumed run starts there, and no loader state has to be
stored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import lightning
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from qvgen.data.noise import sample_generator


class StepBatchSampler(Sampler[list[int]]):
    """Endless micro-batches of sample indices, keyed by the optimizer step.

    Args:
        num_samples: Size of the data set.
        batch_size: Samples per optimizer step, over all ranks and micro-batches.
        accumulate: Micro-batches per optimizer step.
        rank: This process.
        world_size: All processes.
        seed: Seed of the permutations.
        first_step: Called when an iteration begins: the optimizer step to begin with.

    Raises:
        ValueError: The batch is larger than the data set, or can't be cut evenly.
    """

    def __init__(
        self,
        *,
        num_samples: int,
        batch_size: int,
        accumulate: int,
        rank: int,
        world_size: int,
        seed: int,
        first_step: Callable[[], int],
    ) -> None:
        if batch_size > num_samples:
            raise ValueError(f"batch_size={batch_size} is larger than the data set of {num_samples}; use less")
        if batch_size % (accumulate * world_size):
            raise ValueError(
                f"batch_size={batch_size} can't be divided by accumulate={accumulate} x {world_size} devices"
            )
        self.num_samples, self.batch_size, self.accumulate = num_samples, batch_size, accumulate
        self.rank, self.world_size, self.seed = rank, world_size, seed
        self.first_step = first_step
        self._permutation = lru_cache(maxsize=2)(self._draw_permutation)

    def _draw_permutation(self, epoch: int) -> list[int]:
        order: list[int] = torch.randperm(
            self.num_samples, generator=sample_generator("epoch", self.seed, epoch)
        ).tolist()
        return order

    def step_indices(self, step: int) -> list[int]:
        """All samples of an optimizer step, in order."""
        epoch, index = divmod(step, self.num_samples // self.batch_size)
        return self._permutation(epoch)[index * self.batch_size : (index + 1) * self.batch_size]

    def __iter__(self) -> Iterator[list[int]]:
        """Yield this rank's micro-batches, beginning with the first step."""
        step = self.first_step()
        share = self.batch_size // (self.accumulate * self.world_size)
        while True:
            indices = self.step_indices(step)
            for micro in range(self.accumulate):
                start = (micro * self.world_size + self.rank) * share
                yield indices[start : start + share]
            step += 1


class StepKeyedData(lightning.LightningDataModule):
    """The training data of one run.

    Args:
        dataset: Map-style; items have ``video``, ``caption`` and ``sample_id``.
        batch_size: Samples per optimizer step, over all ranks and micro-batches.
        accumulate: Micro-batches per optimizer step.
        seed: Seed of the permutations.
    """

    def __init__(self, dataset: Dataset[Any], *, batch_size: int, accumulate: int, seed: int) -> None:
        super().__init__()
        self.dataset = dataset
        self.batch_size, self.accumulate, self.seed = batch_size, accumulate, seed

    def train_dataloader(self) -> DataLoader[Any]:
        """Loader of this rank's micro-batches; it begins at the trainer's optimizer step."""
        trainer = self.trainer
        assert trainer is not None, "the data module is used by a Trainer"
        sampler = StepBatchSampler(
            num_samples=len(self.dataset),  # type: ignore[arg-type] # a map-style data set has a length
            batch_size=self.batch_size,
            accumulate=self.accumulate,
            rank=trainer.global_rank,
            world_size=trainer.world_size,
            seed=self.seed,
            first_step=lambda: trainer.global_step,
        )
        return DataLoader(self.dataset, batch_sampler=sampler)
