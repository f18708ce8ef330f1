"""The held-out inputs that models are compared on: the same for every one, and a model's outputs for them.

:class:`HeldOut` takes noisy clips of the data; where there are no clips, :mod:`qvgen.evaluation.sampled_inputs` takes
inputs of the full-precision model's own sampling.

Sample i of the held-out split is noised by a generator keyed by ("held_out", HELD_OUT_SEED, i); its noise level is as the
objective draws it. Nothing here depends on the batch size or on the run's seed: the inputs of every run are the same, so that
methods and seeds can be compared in pairs.
"""

from __future__ import annotations

import abc
import logging
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from qvgen.data.noise import NoisyBatch, add_noise, sample_generator
from qvgen.data.source import Split, stacked_conditions
from qvgen.evaluation.distance import RelativeError
from qvgen.evaluation.placement import placed
from qvgen.layers.swap import not_sampling
from qvgen.models.base import VideoDiT

log = logging.getLogger(__name__)

HELD_OUT_SEED = 42
"""Seed of the noise and noise levels in held-out inputs, and of the videos of their captions, in every run."""

FEWEST_HELD_OUT_CLIPS = 8
"""A mean over fewer clips says more about them than about a model."""


def too_few_held_out(count: int) -> str:
    """A sentence on a held-out set that is too small; empty where it is not."""
    if count >= FEWEST_HELD_OUT_CLIPS:
        return ""
    clips = "1 clip" if count == 1 else f"{count} clips"
    return (
        f"The held-out set of {clips} is too small for its errors to be relied on: use {FEWEST_HELD_OUT_CLIPS} or more "
        "(data.held_out, evaluation.samples, more clips)."
    )


class MeasuredInputs(abc.ABC):
    """Fixed inputs, and a model's outputs for them.

    Attributes:
        split: Captions of the videos that are compared, and what turns captions into conditions.
        num_samples: Inputs.
        num_batches: Parts of them, each of which a model works on at once.
        batch_size: Most inputs of a part.
        seed: Seed of the noise and noise levels in them; no run has another one.
        source: The inputs in words, for the report.
    """

    split: Split
    num_samples: int
    num_batches: int
    batch_size: int
    seed: int = HELD_OUT_SEED
    source: str

    @abc.abstractmethod
    def predictions(self, model: nn.Module, batches: Iterable[int] | None = None) -> Iterator[Tensor]:
        """A model's outputs float32 on the CPU, batch by batch; mode and place are restored afterwards.

        Args:
            model: Any model of the family.
            batches: Numbers of the batches, in any order; None: all.
        """

    def relative_error(self, model: nn.Module, reference: Sequence[Tensor]) -> float:
        """|y - y_ref|^2 / |y_ref|^2 over all samples, against stored predictions of another model."""
        return relative_error_of(self.predictions(model), reference)


def relative_error_of(predictions: Iterable[Tensor], reference: Iterable[Tensor]) -> float:
    """|y - y_ref|^2 / |y_ref|^2 over all batches, added in their order."""
    error = RelativeError()
    for predicted, wanted in zip(predictions, reference, strict=True):
        error.update(predicted, wanted)
    return error.compute()


class HeldOut(MeasuredInputs):
    """A fixed set of held-out inputs, and a model's outputs for them.

    Where more inputs are asked for than there are clips, the clips come again with another noise and noise level.

    Args:
        family: The model family: objective and call convention.
        split: Held-out clips.
        num_samples: Inputs.
        batch_size: Inputs that a model works on at once; fewer where the next one is of another bucket.
    """

    source = "held_out"

    @property
    def num_clips(self) -> int:
        """Different clips among the inputs, at most."""
        return min(self.num_samples, self.split.num_clips or len(self.split))

    def __init__(self, family: VideoDiT, split: Split, *, num_samples: int, batch_size: int) -> None:
        self.family, self.split, self.num_samples, self.batch_size = family, split, num_samples, batch_size
        self._batches = [self._draw(indices) for indices in self._cut(batch_size)]
        self.num_batches = len(self._batches)

    def warn_if_few(self) -> None:
        """Log a warning where there are too few clips."""
        caution = too_few_held_out(self.num_clips)
        if caution:
            log.warning("%s", caution)

    def _cut(self, batch_size: int) -> list[list[int]]:
        batches: list[list[int]] = []
        buckets = self.split.buckets
        for index in range(self.num_samples):
            bucket = buckets[index % len(buckets)]
            last = batches[-1] if batches else []
            if last and len(last) < batch_size and buckets[last[-1] % len(buckets)] == bucket:
                last.append(index)
            else:
                batches.append([index])
        return batches

    def _draw(self, indices: Sequence[int]) -> NoisyBatch:
        items = [self.split.samples[index % len(self.split)] for index in indices]
        return add_noise(
            torch.stack([item["video"] for item in items]),
            [item["caption"] for item in items],
            objective=self.family.objective,
            generators=[sample_generator("held_out", self.seed, index) for index in indices],
            image=stacked_conditions(items),
        )

    @torch.no_grad()
    def predictions(self, model: nn.Module, batches: Iterable[int] | None = None) -> Iterator[Tensor]:
        """A model's outputs float32 [b, C, F, H, W] on the CPU, batch by batch; mode and place are restored afterwards."""
        chosen = self._batches if batches is None else [self._batches[number] for number in batches]
        with placed(model) as device, not_sampling(model):
            for batch in chosen:
                encoded = {**self.split.encode(batch.captions), **batch.image}
                condition = {key: value.to(device) for key, value in encoded.items()}
                yield (
                    self.family.predict(model, batch.noisy.to(device), batch.timestep.to(device), condition)
                    .float()
                    .cpu()
                )

    def loss(self, model: nn.Module) -> float:
        """Mean |v - target|^2 against the data's own target, over all samples."""
        total, count = 0.0, 0
        for predicted, batch in zip(self.predictions(model), self._batches, strict=True):
            total += float((predicted - batch.target).double().square().sum())
            count += predicted.numel()
        return total / count
