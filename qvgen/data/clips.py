"""From a video file to what a model is trained on: F frames at the model's rate, H x W pixels, not distorted.

    bucket    the one with the most frames that the clip can fill, then with the nearest aspect ratio
    stride    clip fps / model fps; frame j is round(j * stride), the whole cut lies in the clip's middle
    box       the largest centred box of the bucket's aspect ratio, in fractions of a pixel
    resize    Lanczos, each frame from its box to W x H at once: both directions by the same factor

    >>> info = VideoInfo(num_frames=100, fps=Fraction(24), height=720, width=1280, codec="h264", container="mp4")
    >>> cut = CutSettings(fps=8, buckets=(Bucket(frames=17, height=480, width=720),))
    >>> plan = plan_cut(info, settings=cut)
    >>> plan.indices[:3], plan.indices[-1], plan.box
    ((25, 28, 31), 73, (100.0, 0.0, 1180.0, 720.0))

No frame is ever shown twice: a clip slower than the model's rate is refused, but for ``RATE_TOLERANCE``, within which its
frames are taken one by one. Arithmetic on frames is exact (fractions).

Left out: several cuts from a long clip, a search for scene changes.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from qvgen.config.errors import UserError
from qvgen.data.video import Frames
from qvgen.data.video_reader import VideoInfo, read_frames
from qvgen.run_directory import atomic_write

if TYPE_CHECKING:
    from torch import Tensor

RATE_TOLERANCE = Fraction(1, 10)
"""A clip may be this share slower than the model's rate; then its frames are taken one by one (15 for 16 per second)."""

MAX_ENLARGEMENT = 2.0
"""A clip whose box must be enlarged more than this, in each direction, is refused as too small."""


class BadClip(ValueError):  # noqa: N818 # it names what is refused, and is caught to be reported
    """A clip that can't be used; the message is the reason, without its name."""


@dataclass(frozen=True, kw_only=True, order=True)
class Bucket:
    """A shape of clips.

    Attributes:
        frames: Frames, > 0.
        height: Pixels, > 0.
        width: Pixels, > 0.
    """

    frames: int
    height: int
    width: int

    def __post_init__(self) -> None:
        if min(self.frames, self.height, self.width) < 1:
            raise UserError(f"bucket {self.label} has a side below 1; write frames x height x width, as 49x480x720")

    @property
    def label(self) -> str:
        """``49x480x720``: the form that :meth:`parse` reads."""
        return f"{self.frames}x{self.height}x{self.width}"

    @classmethod
    def parse(cls, text: str) -> Bucket:
        """Read ``49x480x720``: frames, height, width.

        Raises:
            UserError: Another form.

        Example:
            >>> Bucket.parse("49x480x720")
            Bucket(frames=49, height=480, width=720)
        """
        parts = text.split("x")
        if len(parts) != 3 or not all(part.isascii() and part.isdigit() for part in parts):
            raise UserError(f"bucket {text!r} is not frames x height x width; write for example 49x480x720")
        return cls(frames=int(parts[0]), height=int(parts[1]), width=int(parts[2]))


@dataclass(frozen=True, kw_only=True)
class CutSettings:
    """How clips are cut.

    Attributes:
        fps: The model's frames per second, > 0.
        buckets: The shapes that the model is trained on; at least one, all different.
    """

    fps: float
    buckets: tuple[Bucket, ...]

    def __post_init__(self) -> None:
        if not (self.fps > 0 and math.isfinite(self.fps)):
            raise UserError(f"fps={self.fps} must be positive; write for example fps=16")
        if not self.buckets or len(set(self.buckets)) != len(self.buckets):
            shown = ", ".join(bucket.label for bucket in self.buckets)
            raise UserError(f"buckets=[{shown}] must be one or more different shapes; write for example [49x480x720]")


@dataclass(frozen=True, kw_only=True)
class CutPlan:
    """Which frames and which part of them.

    Attributes:
        bucket: The shape that comes out.
        indices: The clip's frames, strictly ascending.
        box: (left, top, right, bottom) in pixels, not rounded.
    """

    bucket: Bucket
    indices: tuple[int, ...]
    box: tuple[float, float, float, float]


def frame_indices(info: VideoInfo, *, frames: int, fps: float) -> tuple[int, ...] | None:
    """Frames of a clip at another rate, from its middle.

    Returns:
        Strictly ascending indices into the clip, or None where the clip is too short.

    Raises:
        BadClip: Its rate is too low.
    """
    if info.num_frames < frames:
        return None  # whatever its rate is: a picture has none
    stride = info.fps / Fraction(fps).limit_denominator(1001)
    if stride < 1:
        if stride < 1 - RATE_TOLERANCE:
            raise BadClip(f"{float(info.fps):.4g} frames per second; the model needs {fps:g}")
        stride = Fraction(1)
    steps = [math.floor(j * stride + Fraction(1, 2)) for j in range(frames)]
    spare = info.num_frames - 1 - steps[-1]
    return None if spare < 0 else tuple(spare // 2 + step for step in steps)


def crop_box(info: VideoInfo, *, height: int, width: int) -> tuple[float, float, float, float]:
    """The largest centred box of a frame with the aspect ratio width : height, as (left, top, right, bottom)."""
    scale = min(Fraction(info.width, width), Fraction(info.height, height))
    left, top = (info.width - scale * width) / 2, (info.height - scale * height) / 2
    return float(left), float(top), float(info.width - left), float(info.height - top)


def choose_bucket(info: VideoInfo, *, settings: CutSettings) -> tuple[Bucket, tuple[int, ...]]:
    """The bucket that fits a clip best, and the clip's frames for it.

    Order: most frames, then nearest aspect ratio (as a factor), then the largest that needs no enlargement, then the
    smallest.

    Raises:
        BadClip: Too short, too slow or too small for every bucket.
    """
    by_frames = {b.frames: frame_indices(info, frames=b.frames, fps=settings.fps) for b in settings.buckets}
    long_enough = [bucket for bucket in settings.buckets if by_frames[bucket.frames] is not None]
    if not long_enough:
        needed = f"{min(by_frames)} at {settings.fps:g}"
        raise BadClip(f"{info.num_frames} frames at {float(info.fps):.4g} per second are too short for {needed}")

    def enlargement(bucket: Bucket) -> Fraction:
        return max(Fraction(bucket.width, info.width), Fraction(bucket.height, info.height))

    def rank(bucket: Bucket) -> tuple[float, ...]:
        stretch = Fraction(bucket.width * info.height, bucket.height * info.width)
        area, sharp = bucket.width * bucket.height, enlargement(bucket) <= 1
        # the aspect is exact first: rounding a logarithm could part two buckets of one aspect ratio
        return (-bucket.frames, float(max(stretch, 1 / stretch)), not sharp, -area if sharp else area)

    large_enough = [bucket for bucket in long_enough if enlargement(bucket) <= MAX_ENLARGEMENT]
    if not large_enough:
        smallest = min(long_enough, key=enlargement)
        raise BadClip(f"{info.width} x {info.height} pixels are too small for {smallest.width} x {smallest.height}")
    bucket = min(large_enough, key=rank)
    indices = by_frames[bucket.frames]
    assert indices is not None
    return bucket, indices


def plan_cut(info: VideoInfo, *, settings: CutSettings) -> CutPlan:
    """Choose bucket, frames and box for a clip.

    Raises:
        BadClip: See :func:`choose_bucket`.
    """
    bucket, indices = choose_bucket(info, settings=settings)
    box = crop_box(info, height=bucket.height, width=bucket.width)
    return CutPlan(bucket=bucket, indices=indices, box=box)


def resize_frames(frames: Frames, *, plan: CutPlan) -> Frames:
    """Crop to the plan's box and resize: uint8 [F, H, W, 3] -> uint8 [F, bucket height, bucket width, 3]."""
    from PIL import Image

    height, width = plan.bucket.height, plan.bucket.width
    if frames.shape[1:3] == (height, width):
        return frames
    resized = np.empty((len(frames), height, width, 3), dtype=np.uint8)
    for index, frame in enumerate(frames):
        # Pillow takes a box in fractions of a pixel and widens its filter when it makes smaller (no aliasing).
        picture = Image.fromarray(np.ascontiguousarray(frame))
        resized[index] = np.asarray(picture.resize((width, height), Image.Resampling.LANCZOS, box=plan.box))
    return resized


def cut_clip(path: Path | str, *, settings: CutSettings) -> tuple[CutPlan, Frames]:
    """Read a video file as its bucket asks for; may hang on a bad file (:mod:`qvgen.data.probe` does not).

    Returns:
        The plan and uint8 [F, H, W, 3] of the bucket's shape.

    Raises:
        BadClip: Too short, too slow or too small.
        ValueError: The file is broken.
        OSError: It can't be read.
    """
    plans: list[CutPlan] = []

    def choose(info: VideoInfo) -> Sequence[int]:
        plans.append(plan_cut(info, settings=settings))
        return plans[0].indices

    _, frames = read_frames(path, choose)
    return plans[0], resize_frames(frames, plan=plans[0])


def to_pixels(frames: Frames) -> Float[Tensor, "3 F H W"]:
    """uint8 [F, H, W, 3] -> float32 [3, F, H, W] in [-1, 1]; 0 -> -1 and 255 -> 1 exactly."""
    from torch import from_numpy  # here: the worker that reads files starts ten times faster without torch

    return from_numpy(np.ascontiguousarray(frames.transpose(3, 0, 1, 2))).float() / 127.5 - 1


def report_bad(bad: Sequence[tuple[str, str]], *, total: int, max_bad: float, report: Path) -> None:
    """Write the clips that can't be used to a CSV file (file_name, reason), and fail where they are too many.

    Raises:
        UserError: More than ``max_bad`` of ``total`` clips are bad, or no clip is left; the report is written before.
        OSError: The report can't be written.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([("file_name", "reason"), *sorted(bad)])
    report.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(report, text.getvalue().encode())
    if too_many_bad(len(bad), total=total, max_bad=max_bad):
        name, reason = sorted(bad)[0]
        raise UserError(
            f"{len(bad)} of {total} clips can't be used, more than max_bad={max_bad:g}; see {report} "
            f"(first: {name}: {reason})"
        )


def too_many_bad(count: int, *, total: int, max_bad: float) -> bool:
    """Whether ``count`` bad clips of ``total`` are too many: above the share, or all of them."""
    return count > max_bad * total or (count > 0 and count == total)
