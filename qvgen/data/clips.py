"""From a video file to what a model is trained on: F frames at the model's rate, H x W pixels, not distorted.

    bucket    the one with the most frames that the clip can fill, then with the nearest aspect ratio
    stride    clip fps / model fps; frame j is round(j * stride), the whole cut lies in the clip's middle; of frames that are
              not evenly spaced, the nearest to each of the model's moments
    box       the largest centred box of the bucket's aspect ratio as it is shown, in fractions of a stored pixel
    resize    Lanczos, each frame from its box to W x H at once: both directions of what is shown by the same factor

    >>> info = VideoInfo(num_frames=100, fps=Fraction(24), height=720, width=1280, codec="h264", container="mp4")
    >>> settings = CutSettings(fps=8, buckets=(Bucket(frames=17, height=480, width=720),))
    >>> cut = choose_cut(info, settings=settings)
    >>> cut.indices[:3], cut.indices[-1], cut.box
    ((25, 28, 31), 73, (100.0, 0.0, 1180.0, 720.0))

No frame is ever shown twice: a clip slower than the model's rate is refused, but for ``RATE_TOLERANCE``, within which its
frames are taken one by one. Arithmetic on frames is exact (fractions).

Left out: several cuts from a long clip, a search for scene changes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from qvgen.data.frame_time import nearest_frames
from qvgen.data.video import Frames
from qvgen.data.video_reader import VideoInfo, read_frames
from qvgen.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

RATE_TOLERANCE = Fraction(1, 10)
"""A clip may be this share slower than the model's rate; then its frames are taken one by one (15 for 16 per second)."""

MAX_ENLARGEMENT = 2.0
"""A clip whose box must be enlarged more than this, in each direction, is refused as too small."""


class BadClip(ValueError):  # noqa: N818 # it names what is refused, and is caught to be reported
    """A clip that can't be used; the message is the reason, without its name."""


class UnevenClip(BadClip):
    """A clip that stands still or has lost frames where it is cut."""


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
class ClipCut:
    """Which frames and which part of them.

    Attributes:
        bucket: The shape that comes out.
        indices: The clip's frames, strictly ascending.
        box: (left, top, right, bottom) in stored pixels, not rounded.
        treatment: See :class:`qvgen.data.video_reader.VideoInfo`.
        used_s: Seconds from the first to the last frame that is used.
        clip_s: Seconds from the first to the last frame of the clip.
        used_area: Share of the picture that lies in the box, in (0, 1].
    """

    bucket: Bucket
    indices: tuple[int, ...]
    box: tuple[float, float, float, float]
    treatment: str
    used_s: float
    clip_s: float
    used_area: float

    @property
    def content(self) -> dict[str, Any]:
        """The values that decide the frames: part of the content key of their latents."""
        key: dict[str, Any] = {"bucket": asdict(self.bucket), "indices": self.indices, "box": self.box}
        return key | ({"treatment": self.treatment} if self.treatment else {})


def frame_indices(info: VideoInfo, *, frames: int, fps: float) -> tuple[int, ...] | None:
    """Frames of a clip at another rate, from its middle.

    Returns:
        Strictly ascending indices into the clip, or None where the clip is too short.

    Raises:
        BadClip: Its rate is too low.
        UnevenClip: Its frames are not evenly spaced, and there is none for one of the model's moments.
    """
    if info.num_frames < frames:
        return None  # whatever its rate is: a picture has none
    stride = info.fps / Fraction(fps).limit_denominator(1001)
    if stride < 1:
        if stride < 1 - RATE_TOLERANCE:
            raise BadClip(f"{float(info.fps):.4g} frames per second; the model needs {fps:g}")
        stride = Fraction(1)
    if info.times_s is not None:
        try:
            return nearest_frames(info.times_s, count=frames, step_s=float(stride / info.fps))
        except ValueError as error:
            raise UnevenClip(str(error)) from error
    steps = [math.floor(j * stride + Fraction(1, 2)) for j in range(frames)]
    spare = info.num_frames - 1 - steps[-1]
    return None if spare < 0 else tuple(spare // 2 + step for step in steps)


def crop_box(info: VideoInfo, *, height: int, width: int) -> tuple[float, float, float, float]:
    """The largest centred box of a frame that is shown as width : height, as (left, top, right, bottom) in its pixels."""
    scale = min(_shown_width(info) / width, Fraction(info.height, height))
    left, top = (info.width - scale * width / info.pixel_aspect) / 2, (info.height - scale * height) / 2
    return float(left), float(top), float(info.width - left), float(info.height - top)


def _shown_width(info: VideoInfo) -> Fraction:
    """Width in units of a pixel's height."""
    return info.width * info.pixel_aspect


def choose_bucket(info: VideoInfo, *, settings: CutSettings) -> tuple[Bucket, tuple[int, ...]]:
    """The bucket that fits a clip best, and the clip's frames for it.

    Order: most frames, then nearest aspect ratio (as a factor), then the largest that needs no enlargement, then the
    smallest.

    Raises:
        BadClip: Too short, too slow or too small for every bucket.
    """
    by_frames: dict[int, tuple[int, ...] | None] = {}
    uneven: list[UnevenClip] = []
    for count in sorted({bucket.frames for bucket in settings.buckets}):
        try:
            by_frames[count] = frame_indices(info, frames=count, fps=settings.fps)
        except UnevenClip as error:  # a shorter cut may lie beside the gap
            by_frames[count] = None
            uneven.append(error)
    long_enough = [bucket for bucket in settings.buckets if by_frames[bucket.frames] is not None]
    if not long_enough:
        if uneven:
            raise uneven[0]
        needed = f"{min(by_frames)} at {settings.fps:g}"
        raise BadClip(f"{info.num_frames} frames at {float(info.fps):.4g} per second are too short for {needed}")

    def enlargement(bucket: Bucket) -> Fraction:  # enlargement of stored pixels, in the direction in which it is larger
        return max(bucket.width / _shown_width(info), Fraction(bucket.height, info.height)) * max(1, info.pixel_aspect)

    def rank(bucket: Bucket) -> tuple[float, ...]:
        stretch = bucket.width * info.height / (bucket.height * _shown_width(info))
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


def choose_cut(info: VideoInfo, *, settings: CutSettings) -> ClipCut:
    """Choose bucket, frames and box for a clip.

    Raises:
        BadClip: See :func:`choose_bucket`.
    """
    bucket, indices = choose_bucket(info, settings=settings)
    left, top, right, bottom = crop_box(info, height=bucket.height, width=bucket.width)

    def seconds(index: int) -> float:
        return info.times_s[index] if info.times_s is not None else float(index / info.fps)

    return ClipCut(
        bucket=bucket,
        indices=indices,
        box=(left, top, right, bottom),
        treatment=info.treatment,
        used_s=seconds(indices[-1]) - seconds(indices[0]),
        clip_s=seconds(info.num_frames - 1),
        used_area=(right - left) * (bottom - top) / (info.width * info.height),
    )


def resize_frames(frames: Frames, *, cut: ClipCut) -> Frames:
    """Crop to the box of a cut and resize: uint8 [F, H, W, 3] -> uint8 [F, bucket height, bucket width, 3]."""
    from PIL import Image

    height, width = cut.bucket.height, cut.bucket.width
    if frames.shape[1:3] == (height, width) and cut.box == (0, 0, width, height):
        return frames
    resized = np.empty((len(frames), height, width, 3), dtype=np.uint8)
    for index, frame in enumerate(frames):
        # Pillow takes a box in fractions of a pixel and widens its filter when it makes smaller (no aliasing).
        picture = Image.fromarray(np.ascontiguousarray(frame))
        resized[index] = np.asarray(picture.resize((width, height), Image.Resampling.LANCZOS, box=cut.box))
    return resized


def cut_clip(path: Path | str, *, settings: CutSettings) -> tuple[ClipCut, Frames]:
    """Read a video file as its bucket asks for; may hang on a bad file (:mod:`qvgen.data.clip_process` does not).

    Returns:
        The cut and uint8 [F, H, W, 3] of the bucket's shape.

    Raises:
        BadClip: Too short, too slow or too small.
        ValueError: The file is broken.
        OSError: It can't be read.
    """
    cuts: list[ClipCut] = []

    def choose(info: VideoInfo) -> Sequence[int]:
        cuts.append(choose_cut(info, settings=settings))
        return cuts[0].indices

    _, frames = read_frames(path, choose)
    return cuts[0], resize_frames(frames, cut=cuts[0])


def to_pixels(frames: Frames) -> Float[Tensor, "3 F H W"]:
    """uint8 [F, H, W, 3] -> float32 [3, F, H, W] in [-1, 1]; 0 -> -1 and 255 -> 1 exactly."""
    from torch import from_numpy  # here: the worker that reads files starts ten times faster without torch

    return from_numpy(np.ascontiguousarray(frames.transpose(3, 0, 1, 2))).float() / 127.5 - 1
