"""Batches of clips of one shape: one bucket per optimizer step, a pure function of (seed, step).

An epoch is a permutation of all samples keyed by (seed, epoch). It is dealt out into one pile per bucket, and a pile that
reaches ``batch_size`` is the next batch. What is left on the piles at the end is left out of this epoch; another permutation
leaves out others. Each bucket gets batches in proportion to its clips, and they come mixed.

    batch_size 2, samples in order and their buckets:   4a 1b 0a 3a 2b 5a   ->   [4 0] [1 2] [3 5]

With a single bucket, step k takes the k-th run of ``batch_size`` samples from the permutation. Micro-batch m of rank r
takes a fixed cut of a step's samples, so that the same samples make the same step whatever the cut is. The first step
is asked for when an iteration begins: a resumed run starts there, and no loader state has to be stored.
"""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import lru_cache

import torch
from torch.utils.data import Sampler

from qvgen.data.noise import sample_generator

log = logging.getLogger(__name__)


class BucketBatchSampler(Sampler[list[int]]):
    """Endless micro-batches of sample indices, each of one bucket, keyed by the optimizer step.

    Args:
        buckets: The bucket of each sample.
        batch_size: Samples per optimizer step, over all ranks and micro-batches.
        accumulate: Micro-batches per optimizer step.
        rank: This process.
        world_size: All processes.
        seed: Seed of the permutations.
        first_step: Called when an iteration begins: the optimizer step to begin with.

    Raises:
        ValueError: No bucket has a whole batch, or a batch can't be cut evenly.
    """

    def __init__(
        self,
        *,
        buckets: Sequence[Hashable],
        batch_size: int,
        accumulate: int,
        rank: int,
        world_size: int,
        seed: int,
        first_step: Callable[[], int],
    ) -> None:
        if batch_size % (accumulate * world_size):
            raise ValueError(
                f"batch_size={batch_size} can't be divided by accumulate={accumulate} x {world_size} devices"
            )
        counts = Counter(buckets)
        self.batches_per_epoch = sum(count // batch_size for count in counts.values())
        if self.batches_per_epoch == 0:
            largest = max(counts.values(), default=0)
            raise ValueError(f"batch_size={batch_size} is larger than the largest bucket of {largest} clips; use less")
        for bucket, count in counts.items():
            if count < batch_size:
                log.warning("bucket %s is never used: its %d clips are no batch of %d", bucket, count, batch_size)
        self.buckets, self.batch_size, self.accumulate = buckets, batch_size, accumulate
        self.rank, self.world_size, self.seed = rank, world_size, seed
        self.first_step = first_step
        self._epoch = lru_cache(maxsize=2)(self._deal_epoch)

    def _deal_epoch(self, epoch: int) -> list[list[int]]:
        order = torch.randperm(len(self.buckets), generator=sample_generator("epoch", self.seed, epoch)).tolist()
        piles: defaultdict[Hashable, list[int]] = defaultdict(list)
        batches = []
        for sample in order:
            pile = piles[self.buckets[sample]]
            pile.append(sample)
            if len(pile) == self.batch_size:
                batches.append(piles.pop(self.buckets[sample]))
        return batches

    def step_indices(self, step: int) -> list[int]:
        """All samples of an optimizer step, in order; all of one bucket."""
        epoch, index = divmod(step, self.batches_per_epoch)
        return self._epoch(epoch)[index]

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
