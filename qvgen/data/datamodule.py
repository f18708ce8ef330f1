"""The training data of a run as Lightning wants it: a loader that begins at the trainer's optimizer step."""

from __future__ import annotations

from typing import Any

import lightning
import torch
from torch.utils.data import DataLoader

from qvgen.data.bucket_sampler import BucketBatchSampler
from qvgen.data.source import Split


class StepKeyedData(lightning.LightningDataModule):
    """The training data of one run.

    Args:
        split: Samples and their buckets.
        batch_size: Samples per optimizer step, over all ranks and micro-batches.
        accumulate: Micro-batches per optimizer step.
        seed: Seed of the permutations.
        context: Ranks that follow each other and have the same samples.
    """

    def __init__(self, split: Split, *, batch_size: int, accumulate: int, seed: int, context: int = 1) -> None:
        super().__init__()
        self.context = context
        self.split = split
        self.batch_size, self.accumulate, self.seed = batch_size, accumulate, seed

    def train_dataloader(self) -> DataLoader[Any]:
        """Loader of this rank's micro-batches; it begins at the trainer's optimizer step."""
        trainer = self.trainer
        assert trainer is not None, "the data module is used by a Trainer"
        sampler = BucketBatchSampler(
            buckets=self.split.buckets,
            batch_size=self.batch_size,
            accumulate=self.accumulate,
            rank=trainer.global_rank // self.context,
            world_size=trainer.world_size // self.context,
            seed=self.seed,
            first_step=lambda: trainer.global_step,
        )
        return DataLoader(self.split.samples, batch_sampler=sampler)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Leave the samples' numbers on the host, where noise is drawn by them: reading them back would wait for a GPU."""
        moved = super().transfer_batch_to_device(batch, device, dataloader_idx)
        return moved | {"sample_id": batch["sample_id"]} if isinstance(batch, dict) else moved


class MeasuredData(StepKeyedData):
    """The training data of a run that is measured while it trains."""

    def val_dataloader(self) -> DataLoader[Any]:
        """One batch, which stands for a whole measurement: its inputs are drawn once, before training."""
        return DataLoader([0], generator=torch.Generator())  # type: ignore[arg-type] # its own: the global one is left alone
