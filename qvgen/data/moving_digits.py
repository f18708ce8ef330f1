"""Coloured scikit-learn digits that move over a torus: the data of the tiny model.

A clip shows one real 8x8 handwritten digit in one colour on a black square. In every frame it moves ``step_pixels``
in one of eight directions, or stands still, and what leaves one edge comes in at the opposite one. The digit starts
in the middle. The caption says everything but the handwriting: "a red three moving up left", "a cyan seven standing
still".

    video[:, f, y, x] = -1 + 2 * color * ink((y - y0 - f*dy) mod S, (x - x0 - f*dx) mod S)

Every clip is a pure function of (seed, split, index): the three choices are taken from one counter-based hash
(SplitMix64), so that any worker can make any clip, in any order, with the same bits. The two splits share no
handwriting: ``train`` draws from the first 1500 images of scikit-learn's set, ``held_out`` from the other 297.

A 4-pixel step on a 16-pixel torus comes home after 4 frames, so a clip of 8 frames shows its loop twice.

Left out: more than one digit, other starts, finer steps, longer clips: a few minutes on two cores did not learn them
(docs/log.md).
"""

from __future__ import annotations

import gzip
import hashlib
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import TypedDict

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from qvgen.data.source import SPLITS, DataSource, Family, Split
from qvgen.errors import UserError

COLORS: dict[str, tuple[float, float, float]] = {
    "red": (1.0, 0.0, 0.0),
    "green": (0.0, 1.0, 0.0),
    "blue": (0.0, 0.0, 1.0),
    "yellow": (1.0, 1.0, 0.0),
    "magenta": (1.0, 0.0, 1.0),
    "cyan": (0.0, 1.0, 1.0),
}
"""Name -> RGB in [0, 1]."""

DIGITS: tuple[str, ...] = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

MOTIONS: dict[str, tuple[int, int]] = {
    "standing still": (0, 0),
    "moving up": (-1, 0),
    "moving down": (1, 0),
    "moving left": (0, -1),
    "moving right": (0, 1),
    "moving up left": (-1, -1),
    "moving up right": (-1, 1),
    "moving down left": (1, -1),
    "moving down right": (1, 1),
}
"""Phrase -> (dy, dx), in steps per frame; y grows downwards."""

DIGIT_PIXELS = 8
TRAIN_IMAGES = 1500
_MASK_64 = (1 << 64) - 1


class MovingDigit(TypedDict):
    """One clip.

    Attributes:
        video: float32 [3, F, S, S], RGB in [-1, 1], background -1.
        caption: what the clip shows, in words.
        digit: class in [0, 10).
        color: index into ``COLORS``.
        motion: index into ``MOTIONS``.
        sample_id: the clip's index in its split.
    """

    video: Tensor
    caption: str
    digit: int
    color: int
    motion: int
    sample_id: int


def caption_of(*, digit: int, color: int, motion: int) -> str:
    """Word a clip's content.

    >>> caption_of(digit=3, color=0, motion=5)
    'a red three moving up left'
    """
    return f"a {tuple(COLORS)[color]} {DIGITS[digit]} {tuple(MOTIONS)[motion]}"


class MovingDigits(Dataset[MovingDigit]):
    """Map-style dataset of moving digits; item ``i`` is the same in every process and on every machine.

    Args:
        split: "train" or "held_out"; they share no handwriting.
        seed: another seed is another set of clips from the same handwriting.
        length: number of clips.
        image_size: S, the side of the square in pixels, at least 8.
        num_frames: F, frames per clip.
        step_pixels: pixels that a moving digit moves per frame along each axis it moves on.

    Raises:
        ValueError: for an unknown split or a size that can't hold a digit.
    """

    def __init__(
        self,
        *,
        split: str = "train",
        seed: int = 0,
        length: int = 20_000,
        image_size: int = 16,
        num_frames: int = 8,
        step_pixels: int = 4,
    ) -> None:
        if split not in SPLITS:
            raise ValueError(f"split={split!r} is unknown; use one of {', '.join(SPLITS)}")
        if image_size < DIGIT_PIXELS:
            raise ValueError(f"image_size={image_size} can't hold a digit; use at least {DIGIT_PIXELS}")
        for name, value in (("length", length), ("num_frames", num_frames)):
            if value < 1:
                raise ValueError(f"{name}={value} must be positive")
        if seed < 0:
            raise ValueError(f"seed={seed} must not be negative")
        self.split = split
        self.seed = seed
        self.length = length
        self.image_size = image_size
        self.num_frames = num_frames
        self.step_pixels = step_pixels
        self._ink, self._labels = _handwriting(split)

    def __len__(self) -> int:
        """Return the number of clips."""
        return self.length

    def __getitem__(self, index: int) -> MovingDigit:
        """Make clip ``index``.

        Raises:
            IndexError: when index is not in [0, length), which also ends a plain ``for``.
        """
        if not 0 <= index < self.length:
            raise IndexError(f"index={index} is not in [0, {self.length})")
        choice = _SplitMix64(self.seed, SPLITS.index(self.split), index)
        image = choice.below(len(self._labels))
        color = choice.below(len(COLORS))
        motion = choice.below(len(MOTIONS))
        digit = self._labels[image]
        return MovingDigit(
            video=self._render(self._ink[image], color=color, motion=motion),
            caption=caption_of(digit=digit, color=color, motion=motion),
            digit=digit,
            color=color,
            motion=motion,
            sample_id=index,
        )

    def _render(self, ink: Tensor, *, color: int, motion: int) -> Tensor:
        """Paint the digit into every frame.

        Args:
            ink: float32 [8, 8] in [0, 1].
            color: index into ``COLORS``.
            motion: index into ``MOTIONS``.

        Returns:
            float32 [3, F, S, S] in [-1, 1]; exact (each value is one product and one sum).
        """
        frame = torch.arange(self.num_frames)[:, None, None]
        offset = torch.arange(DIGIT_PIXELS)
        start = (self.image_size - DIGIT_PIXELS) // 2
        direction_y, direction_x = tuple(MOTIONS.values())[motion]
        row = (start + frame * direction_y * self.step_pixels + offset[None, :, None]) % self.image_size
        column = (start + frame * direction_x * self.step_pixels + offset[None, None, :]) % self.image_size
        canvas = torch.zeros(self.num_frames, self.image_size, self.image_size)
        canvas[frame, row, column] = ink
        rgb = torch.tensor(tuple(COLORS.values())[color])
        return rgb[:, None, None, None] * canvas * 2 - 1


@dataclass(frozen=True, kw_only=True)
class MovingDigitsSource(DataSource):
    """``data=moving_digits``: the two splits under one setting.

    Attributes:
        length: Number of clips of each split, at least 1.
        image_size: Side of the square frame in pixels, at least 8; the model's.
        num_frames: Frames of a clip, at least 1; the model's.
        step_pixels: Pixels by which a moving digit moves from frame to frame, along each axis that it moves on.
    """

    length: int
    image_size: int
    num_frames: int
    step_pixels: int

    def check(self, family: Family) -> None:
        """Raise ValueError where the family does not take videos of this shape."""
        shape = (3, self.num_frames, self.image_size, self.image_size)
        if shape != family.sample_shape:
            raise UserError(
                f"data=moving_digits has videos of shape {shape}, model={family.name} takes {family.sample_shape}; "
                "choose data that fits: data=clips data.path=FOLDER for a model with a VAE"
            )

    def identity(self, family: Family) -> dict[str, str]:
        """The handwriting, which comes with scikit-learn; see :meth:`qvgen.data.source.DataSource.identity`."""
        del family
        digest = hashlib.sha256()
        for split in SPLITS:
            ink, labels = _handwriting(split)
            digest.update(ink.numpy().tobytes())
            digest.update(bytes(labels))
        return {"handwriting": digest.hexdigest()}

    def open(self, family: Family, *, split: str) -> Split:
        """The samples of ``train`` or ``held_out``, all of one bucket."""
        samples = MovingDigits(
            split=split,
            length=self.length,
            image_size=self.image_size,
            num_frames=self.num_frames,
            step_pixels=self.step_pixels,
        )
        return Split(samples=samples, buckets=[""] * self.length, encode=family.encode)


class _SplitMix64:
    """Small counter-based generator: a few uniform integers per clip without a torch.Generator for each.

    Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators" (OOPSLA 2014), the SplitMix64 finalizer.
    """

    def __init__(self, *keys: int) -> None:
        self._state = 0
        for key in keys:
            self._state = self._next() ^ key

    def _next(self) -> int:
        self._state = (self._state + 0x9E3779B97F4A7C15) & _MASK_64
        mixed = self._state
        mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & _MASK_64
        mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _MASK_64
        return mixed ^ (mixed >> 31)

    def below(self, limit: int) -> int:
        """Return an integer in [0, limit); uniform to limit/2^64."""
        return (self._next() * limit) >> 64


@lru_cache(maxsize=len(SPLITS))
def _handwriting(split: str) -> tuple[Tensor, tuple[int, ...]]:
    """Read one split of scikit-learn's digits: ink float32 [n, 8, 8] in [0, 1], and n labels."""
    table = _digits()
    part = slice(0, TRAIN_IMAGES) if split == "train" else slice(TRAIN_IMAGES, None)
    pixels = torch.tensor(table[part, :-1], dtype=torch.float32)
    ink = pixels.unflatten(1, (8, 8)) / 16  # the set has 17 levels of ink, 0..16
    return ink, tuple(int(label) for label in table[part, -1])


_DIGITS_FILE = "datasets/data/digits.csv.gz"
"""Where scikit-learn keeps its digits, in its own folder."""


def _digits() -> np.ndarray:
    """Scikit-learn's digits, float64 [1797, 65]: 64 pixels and the label.

    They are read from the file that its ``load_digits`` reads: importing scikit-learn takes a second, in each process. A
    version that keeps them elsewhere is asked itself.
    """
    package = find_spec("sklearn")
    if package is None or package.origin is None:
        raise RuntimeError(
            "scikit-learn, whose digits the data set is made of, is not installed; pip install scikit-learn"
        )
    file = Path(package.origin).parent / _DIGITS_FILE
    if not file.is_file():
        from sklearn.datasets import load_digits

        found = load_digits()
        return np.column_stack([found.data, found.target])
    with gzip.open(file, "rt", encoding="utf-8") as text:
        return np.loadtxt(text, delimiter=",")
