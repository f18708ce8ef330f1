"""Where samples come from: the protocol between the data and everything that trains on it or measures with it.

    source.check(family)            can this family be trained on it? cheap, before anything is loaded
    source.open(family, split=...)  the samples of a split, and what turns their captions into conditions

A source is built from ``conf/data/NAME.yaml`` and owns no model: what it needs of one (:class:`Family`) is passed to it.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset

from qvgen.data.clip_report import FillReport

SPLITS = ("train", "held_out")

IMAGE_CONDITION = "image_condition"
"""Name in a sample of the tensors that the clip's first frame became; see :class:`Split`."""

Encode = Callable[[Sequence[str]], Mapping[str, Tensor]]
"""Captions -> named tensors with a row for each."""


class Family(Protocol):
    """The part of a model family that every source needs."""

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
        samples: Map-style; items have ``video`` float32 [C, F, H, W], ``caption`` and ``sample_id``; for a model that is told
            the first frame also ``image``, the frame itself as uint8 [H, W, 3], and ``image_condition``, what it became.
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


def stacked_conditions(items: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """The conditions that the first frames of samples became, with a row for each; empty where samples have none."""
    found = [item.get(IMAGE_CONDITION, {}) for item in items]
    return {name: torch.stack([condition[name] for condition in found]) for name in found[0]}


class DataSource(abc.ABC):
    """Base of the leaves of conf/data; the defaults are those of a source that makes its samples as they are asked for.

    Attributes:
        encodes: Whether samples are encoded once, into a cache: such a source is an :class:`EncodedSource`.
    """

    encodes: ClassVar[bool] = False

    @property
    def is_given(self) -> bool:
        """Whether it is known where the samples are; `qvgen ptq` can do without any, nothing else can."""
        return True

    @abc.abstractmethod
    def identity(self, family: Any) -> dict[str, str]:
        """The identity of the samples: name of a part -> checksum of its content, whatever it is called and wherever it lies.

        Raises:
            ValueError: They are not ready.
        """

    @abc.abstractmethod
    def check(self, family: Any) -> None:
        """Raise ValueError where the family can't be trained on this data, whatever its files hold."""

    @abc.abstractmethod
    def open(self, family: Any, *, split: str) -> Split:
        """The samples of ``train`` or ``held_out``.

        Raises:
            ValueError: There are none, or they are not ready.
        """

    def num_clips(self) -> int | None:
        """Clips that the source has, usable or not; None where they are not counted or not given."""
        return None

    def summary(self) -> list[str]:
        """A plan's lines about the samples; nothing is encoded for them."""
        return []


class EncodedSource(DataSource):
    """A source whose samples and captions are encoded once, by the model's own VAE and text encoder, into a cache.

    Attributes:
        cache: Folder of what is encoded; any number of runs may share it.
    """

    encodes = True
    cache: str

    @property
    @abc.abstractmethod
    def origin(self) -> str:
        """The thing that is encoded, in a word for messages."""

    @abc.abstractmethod
    def is_complete(self, family: Any, *, captions: Sequence[str]) -> bool:
        """Whether the cache holds every clip, and these captions too."""

    @abc.abstractmethod
    def fill(self, family: Any, *, captions: Sequence[str], shard: int = 0, num_shards: int = 1) -> FillReport:
        """Encode what is missing of a share of the cache: clips shard, shard + num_shards, ...

        Args:
            family: The family that encodes.
            captions: Texts to encode besides the clips' captions.
            shard: The share, 0 <= shard < num_shards.
            num_shards: Shares.

        Raises:
            UserError: Too many clips are unusable.
        """

    @abc.abstractmethod
    def describe_share(self, family: Any, *, shard: int, num_shards: int) -> list[str]:
        """Lines that say what :meth:`fill` would do; nothing is encoded and no weights are read."""
