"""The side of a metric that `qvgen evaluate` knows: what is said of it, and one of three ways to measure.

    VideoMetric   one number for each video, some of them beside the reference's video of the same caption and noise
    SetMetric     one number for all videos beside all of the reference's, from features of each video
    ModelMetric   one number for each video, from the calls that the reference model makes while it samples that video

A metric is a class in a file of its own and a file conf/metric/NAME.yaml. What is computed of a video depends on that video
alone, so that any order, and any number of stops in between, gives the same bits. Everything is float64 but the networks.
"""

from __future__ import annotations

import abc
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from jaxtyping import Float, UInt8
from torch import Tensor

from qvgen.evaluation.networks.fetched import Weights
from qvgen.evaluation.prompt_list import PromptFacts

T = TypeVar("T")
Damage = Literal["noise", "frozen", "flicker", "blur", "color"]
"""Injected damage that a metric may be blind to; docs/evaluation.md says what each is."""


class Clip:
    """One video, and what was computed of it, which several metrics share.

    Args:
        frames: uint8 [F, H, W, 3], RGB.
    """

    def __init__(self, frames: UInt8[Tensor, "F H W 3"]) -> None:
        self.frames = frames
        self._known: dict[str, Any] = {}

    def once(self, name: str, compute: Callable[[], T]) -> T:
        """The value of this name, computed the first time it is asked for."""
        if name not in self._known:
            self._known[name] = compute()
        found: T = self._known[name]
        return found


@dataclass(frozen=True, kw_only=True, eq=False)
class Pair:
    """A video and what it is measured beside.

    Attributes:
        video: The video that is judged.
        reference: The reference's video of the same caption and noise, of the same shape; None where there is none, and
            where the metric is not paired.
        caption: Text that it was made from; None where nobody said it.
        fps: Frames per second of both; None where nobody said it.
        prompt: The caption's entry in the list of prompts; None where it is not in the list, or there is no list.
        has_prompt_list: Whether there is a list of prompts (``vbench.info``).
    """

    video: Clip
    reference: Clip | None
    caption: str | None
    fps: float | None = None
    prompt: PromptFacts | None = None
    has_prompt_list: bool = False


@dataclass(frozen=True, kw_only=True, eq=False)
class ComparedCall:
    """One call of the reference model while it samples, and the judged model's answer to the same input.

    Attributes:
        timestep: Mean timestep of the call's samples, in [0, 1000].
        output: float [B, ...] of the judged model.
        reference: float [B, ...] of the reference model.
    """

    timestep: float
    output: Tensor
    reference: Tensor


class Metric(abc.ABC):
    """Everything that is said of a metric.

    Attributes:
        title: As a table's heading has it.
        unit: Unit of its values; empty for a pure number.
        source: Where it is defined.
        low: Smallest value that it can have.
        high: Largest value that it can have.
        better: Which of two values is the better one; "neither" where a change in either direction is a change.
        paired: Whether it compares with the reference's video.
        blind_to: Injected damage that does not move it, or moves it the wrong way.
        weights: Files of networks that it needs.
        slow_on_cpu: Whether one small video takes a CPU core seconds; a report leaves it out there.
    """

    title: str
    unit: str = ""
    source: str
    low: float = 0.0
    high: float = float("inf")
    better: Literal["higher", "lower", "neither"]
    paired: bool
    blind_to: tuple[Damage, ...] = ()
    weights: tuple[Weights, ...] = ()
    slow_on_cpu: bool = False

    def absent(self) -> str | None:
        """Why it can't be measured here, for example the file that is not there; None: it can be."""
        return next((why for weights in self.weights if (why := weights.absent) is not None), None)

    def key(self) -> str:
        """The parts that decide its values: the class, its arguments, and the checksums of its weights."""
        arguments = {name: value for name, value in vars(self).items() if not name.startswith("_")}
        checksums = [weights.sha256 for weights in self.weights]
        return json.dumps([f"{type(self).__module__}.{type(self).__qualname__}", arguments, checksums], default=str)

    def weight_facts(self) -> list[dict[str, str]]:
        """The files of weights that decide its values, for evaluation.json."""
        return [{"file": f"{w.asset}/{w.file}", "archive_sha256": w.sha256} for w in self.weights]


class VideoMetric(Metric):
    """A metric with a number for each video."""

    def concerns(self, pair: Pair) -> bool:  # noqa: ARG002 - others look at the pair
        """Whether it is measured of this video at all."""
        return True

    @abc.abstractmethod
    def measure(self, pair: Pair) -> float | None:
        """The value of one video, finite; None where its definition gives this video none.

        Raises:
            ValueError: The video is not one that it can measure, for example of a single frame.
        """


class SetMetric(Metric):
    """A metric of all videos together.

    Attributes:
        enough: Videos below which its value says more about their number than about the model.
    """

    paired = True
    enough: int = 256

    @abc.abstractmethod
    def features(self, clip: Clip) -> Float[Tensor, " D"]:
        """The features of one video, float64 [D]."""

    @abc.abstractmethod
    def distance(self, videos: Float[Tensor, "N D"], reference: Float[Tensor, "M D"]) -> float:
        """The value, from the features of all videos, N >= 2."""


class ModelMetric(Metric):
    """A metric of the model itself.

    Attributes:
        videos: So many videos are sampled again by the reference model to record its calls: the first of each prompt, then
            the second of each.
    """

    paired = True
    videos: int

    @abc.abstractmethod
    def measure(self, calls: Sequence[ComparedCall]) -> float | None:
        """The value of one video's calls; None where none of them concerns it."""


def check_frames(clip: Clip, *, metric: str) -> None:
    """Raise ValueError for a video of one frame, in which nothing moves."""
    if len(clip.frames) < 2:
        raise ValueError(f"{metric} needs videos of 2 frames or more, and they have {len(clip.frames)}; leave it out")
