"""Where samples come from: the protocol between the data and everything that trains on it or measures with it.

    source.check(family)            can this family be trained on it? cheap, before anything is loaded
    source.open(family, split=...)  the samples of a split, and what turns their captions into conditions

A source is built from ``conf/data/NAME.yaml`` and owns no model: what it needs of one (:class:`Family`) is passed to it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor
from torch.utils.data import Dataset

SPLITS = ("train", "held_out")

Encode = Callable[[Sequence[str]], Mapping[str, Tensor]]
"""Captions -> named tensors with a row for each."""


class Family(Protocol):
    """What every source needs of a model family."""

    name: str

    @property
    def sample_shape(self) -> tuple[int, int, int, int]:
        """(C, F, H, W) of one sample."""

    def encode(self, captions: Sequence[str]) -> Mapping[str, Tensor]:
        """Turn captions into conditions."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Split:
    """The samples of a split.

    Attributes:
        samples: Map-style; items have ``video`` float32 [C, F, H, W], ``caption`` and ``sample_id``.
        buckets: One per sample; samples of a batch have the same one.
        encode: Turns the samples' captions, the empty one and those of validation into conditions.
        num_clips: Different clips among the samples, where one may stand in several rows; None: as many as samples.
        left_out: One line on what of the data behind the samples is not used; empty where nothing is.
    """

    samples: Dataset[Any]
    buckets: Sequence[Hashable]
    encode: Encode
    num_clips: int | None = None
    left_out: str = ""

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.buckets)


class DataSource(Protocol):
    """A leaf of conf/data."""

    def identity(self, family: Any) -> dict[str, str]:
        """What decides the samples: name of a part -> checksum of its content, whatever it is called and wherever it lies.

        Raises:
            ValueError: They are not ready.
        """

    def check(self, family: Any) -> None:
        """Raise ValueError where the family can't be trained on this data, whatever its files hold."""

    def open(self, family: Any, *, split: str) -> Split:
        """The samples of ``train`` or ``held_out``.

        Raises:
            ValueError: There are none, or they are not ready.
        """
