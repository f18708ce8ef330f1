"""A small classifier of moving digits: does a generated video show the digit, the colour and the motion that was asked for?

Three heads on one small 3-D convolution net, trained on the same data as the video model (its training split) and
measured on the held-out split. Its weights travel with the package. A score of a generated video is only as good as
the classifier: its own held-out accuracy is in its card and bounds what a model can reach.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn import functional

from qvgen.data.moving_digits import COLORS, DIGITS, MOTIONS, MovingDigits
from qvgen.data.noise import sample_generator
from qvgen.models.weight_file import ASSETS_DIRECTORY, check_state, load_weights

ATTRIBUTES = ("digit", "color", "motion")
CLASSIFIER_FILE = "tiny_classifier.safetensors"

VIDEO_SHAPE = (8, 16, 16, 3)
"""(F, S, S, 3) of the videos that the shipped classifier reads."""

_SIZES = {"digit": len(DIGITS), "color": len(COLORS), "motion": len(MOTIONS)}
_CHANNELS = 32
_BATCH_SIZE = 64
_LEARNING_RATE = 3e-3
_NOISE = 0.15
"""Standard deviation of the noise on training pixels in [-1, 1]: generated videos are less clean than the data."""


class MovingDigitClassifier(nn.Module):
    """Videos to logits of the three attributes."""

    def __init__(self) -> None:
        super().__init__()
        # Circular padding in space: the digits live on a torus.
        self.first = nn.Conv3d(3, _CHANNELS, 3, padding=1, padding_mode="circular")
        self.second = nn.Conv3d(_CHANNELS, 2 * _CHANNELS, 3, stride=(1, 2, 2), padding=1, padding_mode="circular")
        self.third = nn.Conv3d(2 * _CHANNELS, 4 * _CHANNELS, 3, stride=(2, 2, 2), padding=1, padding_mode="circular")
        self.heads = nn.ModuleDict({name: nn.LazyLinear(size) for name, size in _SIZES.items()})

    def forward(self, video: Float[Tensor, "B 3 F S S"]) -> dict[str, Tensor]:
        """Logits [B, classes] by attribute, of videos in [-1, 1]."""
        features = functional.gelu(self.first(video))
        features = functional.gelu(self.second(features))
        features = functional.gelu(self.third(features)).flatten(1)
        return {name: head(features) for name, head in self.heads.items()}

    @torch.no_grad()
    def accuracy(self, videos: UInt8[Tensor, "B F S S 3"], labels: Mapping[str, Tensor]) -> dict[str, float]:
        """Share of videos whose likeliest class is the label, by attribute.

        Args:
            videos: uint8 [B, F, S, S, 3].
            labels: int64 [B] by attribute.
        """
        logits = self(videos.permute(0, 4, 1, 2, 3).float() / 127.5 - 1)
        return {name: float((logits[name].argmax(-1) == labels[name]).float().mean()) for name in ATTRIBUTES}


def train_classifier(dataset: MovingDigits, *, steps: int, seed: int) -> MovingDigitClassifier:
    """Train a classifier.

    Args:
        dataset: Training split.
        steps: Optimizer steps of 64 clips.
        seed: Seed of weights, order and noise.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        classifier = _new(dataset.num_frames, dataset.image_size)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=_LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = sample_generator("classifier", seed)
    for _ in range(steps):
        indices = torch.randint(len(dataset), (_BATCH_SIZE,), generator=generator).tolist()
        items = [dataset[index] for index in indices]
        video = torch.stack([item["video"] for item in items])
        logits = classifier(video + _NOISE * torch.randn(video.shape, generator=generator))
        labels = _labels(items)
        loss = torch.stack([functional.cross_entropy(logits[name], labels[name]) for name in ATTRIBUTES]).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return classifier.eval().requires_grad_(False)


def dataset_accuracy(classifier: MovingDigitClassifier, dataset: MovingDigits, *, count: int) -> dict[str, float]:
    """Accuracy of a classifier on the first ``count`` clips of a data set."""
    items = [dataset[index] for index in range(count)]
    videos = ((torch.stack([item["video"] for item in items]) + 1) * 127.5).round().to(torch.uint8)
    return classifier.accuracy(videos.permute(0, 2, 3, 4, 1), _labels(items))


@lru_cache(maxsize=1)
def load_classifier() -> MovingDigitClassifier:
    """The classifier that the package ships; raises ValueError where its weights are missing or damaged."""
    path = ASSETS_DIRECTORY / CLASSIFIER_FILE
    dataset = MovingDigits()
    classifier = _new(dataset.num_frames, dataset.image_size)
    tensors = load_weights(path)
    check_state(classifier, tensors, path=path)
    classifier.load_state_dict(tensors, strict=True)
    return classifier.eval().requires_grad_(False)


def _new(num_frames: int, image_size: int) -> MovingDigitClassifier:
    classifier = MovingDigitClassifier()
    classifier(torch.zeros(1, 3, num_frames, image_size, image_size))  # sizes the heads
    return classifier


def _labels(items: list[Any]) -> dict[str, Tensor]:
    return {name: torch.tensor([item[name] for item in items]) for name in ATTRIBUTES}
