"""Held-out predictions: the same noisy clips, noise levels and captions for every model that is compared.

Sample i of the held-out split is noised by a generator keyed by ("held_out", seed, i); its noise level is as the objective
draws it. Nothing here depends on the batch size.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from qvgen.data.noise import NoisyBatch, add_noise, sample_generator
from qvgen.evaluation.metrics import RelativeError
from qvgen.models.base import VideoDiT

BATCH_SIZE = 32


class HeldOut:
    """A fixed set of held-out inputs, and the teacher's outputs for them.

    Args:
        family: The model family: objective, captions and call convention.
        dataset: Held-out split; items have ``video`` and ``caption``.
        num_samples: How many of it; at most all.
        seed: Seed of noise and noise levels.

    Raises:
        ValueError: The split has fewer samples.
    """

    def __init__(self, family: VideoDiT, dataset: Dataset[Any], *, num_samples: int, seed: int) -> None:
        size = len(dataset)  # type: ignore[arg-type] # a map-style data set has a length
        if num_samples > size:
            raise ValueError(f"evaluation.samples={num_samples} is more than the held-out split has ({size}); use less")
        self.family, self.seed, self.num_samples = family, seed, num_samples
        self._batches = [
            self._draw(dataset, range(start, min(start + BATCH_SIZE, num_samples)))
            for start in range(0, num_samples, BATCH_SIZE)
        ]

    def _draw(self, dataset: Dataset[Any], indices: range) -> NoisyBatch:
        items = [dataset[index] for index in indices]
        return add_noise(
            torch.stack([item["video"] for item in items]),
            [item["caption"] for item in items],
            objective=self.family.objective,
            generators=[sample_generator("held_out", self.seed, index) for index in indices],
        )

    @torch.no_grad()
    def predictions(self, model: nn.Module) -> Iterator[Tensor]:
        """A model's outputs float32 [b, C, F, H, W], batch by batch; its training mode is restored afterwards."""
        device = next(model.parameters()).device
        was_training = model.training
        model.eval()
        try:
            for batch in self._batches:
                condition = {key: value.to(device) for key, value in self.family.encode(batch.captions).items()}
                yield (
                    self.family.predict(model, batch.noisy.to(device), batch.timestep.to(device), condition)
                    .float()
                    .cpu()
                )
        finally:
            model.train(was_training)

    def relative_error(self, model: nn.Module, reference: list[Tensor]) -> float:
        """|y - y_ref|^2 / |y_ref|^2 over all samples, against stored predictions of another model."""
        error = RelativeError()
        for found, wanted in zip(self.predictions(model), reference, strict=True):
            error.update(found, wanted)
        return error.compute()

    def loss(self, model: nn.Module) -> float:
        """Mean |v - target|^2 against the data's own target, over all samples."""
        total, count = 0.0, 0
        for found, batch in zip(self.predictions(model), self._batches, strict=True):
            total += float((found - batch.target).double().square().sum())
            count += found.numel()
        return total / count
