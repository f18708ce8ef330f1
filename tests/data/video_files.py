"""Procedural video files for tests: several sizes, rates and lengths, whole and broken."""

from __future__ import annotations

import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from qvgen.data.video import Frames, write_video


def counting_frames(num_frames: int, *, height: int = 48, width: int = 64) -> Frames:
    """Frames of one colour that says which they are: digits of the index to base 6, one per channel, 40 levels apart."""
    index = np.arange(num_frames)[:, None]
    levels = (20 + 40 * (index // [1, 6, 36] % 6)).astype(np.uint8)
    return np.broadcast_to(levels[:, None, None, :], (num_frames, height, width, 3)).copy()


def index_of(frame: np.ndarray) -> int:
    """Which frame of :func:`counting_frames` this is."""
    digits = np.rint((np.median(frame, axis=(0, 1)) - 20) / 40)
    return int(digits @ [1, 6, 36])


def write_clip(path: Path, num_frames: int, *, fps: float = 16, height: int = 48, width: int = 64) -> Path:
    """An mp4 file of :func:`counting_frames`."""
    return write_video(path, counting_frames(num_frames, height=height, width=width), fps=fps, scale=1)


def write_stream(path: Path, frames: Frames, *, codec: str, fps: int = 16, faststart: bool = False) -> Path:
    """A file in the format that its name says, with another codec or its index first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", options={"movflags": "faststart"} if faststart else {}) as container:
        stream = container.add_stream(codec, rate=Fraction(fps))
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def turn_clockwise(path: Path) -> None:
    """Write a rotation of 90 degrees into an mp4 file's header, as telephones do."""
    data = bytearray(path.read_bytes())
    header = data.find(b"tkhd") + 4
    matrix = header + 4 + (20 if data[header] == 0 else 32) + 16
    data[matrix : matrix + 36] = struct.pack(">9i", 0, 65536, 0, -65536, 0, 0, 0, 0, 1 << 30)
    path.write_bytes(data)


def trim(path: Path, *, frames: int, fps: int) -> None:
    """Shorten an mp4 file's edit list, as a cut without re-encoding does: later frames are there but not shown."""
    data = bytearray(path.read_bytes())
    entry = data.find(b"elst") + 4 + 4 + 4  # version 0: duration (in the movie's time scale), media time, rate
    movie = data.find(b"mvhd") + 4
    time_scale = struct.unpack(">I", data[movie + 12 : movie + 16])[0]
    data[entry : entry + 4] = struct.pack(">I", round(frames * time_scale / fps))
    path.write_bytes(data)
