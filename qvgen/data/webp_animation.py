"""Animated WebP, which PyAV's FFmpeg does not decode: Pillow does.

    path --Pillow--> durations --> times; pictures --EXIF's orientation--> uint8 RGB [n, H, W, 3]

A picture that is transparent in part, or has a colour profile other than sRGB, is refused, as in every other format.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np

from qvgen.data.frame_format import refuse_profile
from qvgen.data.frame_time import Timing, read_timing
from qvgen.data.video import Frames

_ORIENTATION = 0x0112
_TURNED_ORIENTATIONS = (5, 6, 7, 8)


def is_webp(path: Path) -> bool:
    """Whether a file begins as WebP does."""
    with path.open("rb") as file:
        head = file.read(12)
    return head[:4] == b"RIFF" and head[8:] == b"WEBP"


def probe_webp(path: Path) -> tuple[int, Timing, tuple[int, int]]:
    """Number of pictures, timing and (height, width), upright; Pillow knows a picture's duration only once it is decoded.

    Raises:
        ValueError: It is no whole WebP file, it has no durations, or another profile than sRGB.
    """
    from PIL import Image

    durations_ms = []
    try:
        with Image.open(path) as picture:
            width, height = picture.size
            if picture.getexif().get(_ORIENTATION) in _TURNED_ORIENTATIONS:
                height, width = width, height
            profile = picture.info.get("icc_profile")
            for index in range(int(getattr(picture, "n_frames", 1))):
                picture.seek(index)
                picture.load()
                durations_ms.append(int(picture.info.get("duration", 0)))
    except (OSError, EOFError, SyntaxError, ValueError) as error:
        raise ValueError(f"{path} can't be decoded after picture {len(durations_ms)}: {error}") from error
    refusal = refuse_profile(profile) if profile else ""
    if refusal:
        raise ValueError(f"{path} {refusal}")
    starts = [Fraction(start, 1000) for start in itertools.accumulate(durations_ms[:-1], initial=0)]
    total = sum(durations_ms)
    stated = Fraction(1000 * len(durations_ms), total) if total else None
    try:
        return len(starts), read_timing(starts, tick=Fraction(1, 1000), stated=stated), (height, width)
    except ValueError as error:
        raise ValueError(f"{path} {error}") from error


def read_webp(path: Path, indices: Sequence[int]) -> Frames:
    """Some pictures, uint8 [n, H, W, 3], upright.

    Raises:
        ValueError: One is transparent in part.
    """
    from PIL import Image, ImageOps

    frames = []
    with Image.open(path) as picture:
        exif = picture.getexif()
        for index in indices:
            picture.seek(index)
            if picture.mode == "RGBA" and picture.getextrema()[3][0] < 255:
                raise ValueError(f"{path} is transparent in part (picture {index}); put it on a background first")
            turned = picture.convert("RGB")
            turned.getexif()[_ORIENTATION] = exif.get(_ORIENTATION, 1)
            frames.append(np.asarray(ImageOps.exif_transpose(turned)))
    return np.stack(frames)
