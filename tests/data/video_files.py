"""Procedural video files for tests: several sizes, rates and lengths, whole and broken."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

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


def write_stream(
    path: Path,
    frames: Frames,
    *,
    codec: str,
    fps: int = 16,
    faststart: bool = False,
    options: Mapping[str, str] | None = None,
    **context: Any,
) -> Path:
    """A file in the format that its name says, with another codec or its index first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", options={"movflags": "faststart"} if faststart else {}) as container:
        stream = container.add_stream(codec, rate=Fraction(fps), options=dict(options or {}))
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        for name, value in context.items():
            setattr(stream.codec_context, name, value)
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def trim(path: Path, *, frames: int, fps: int) -> None:
    """Shorten an mp4 file's edit list, as a cut without re-encoding does: later frames are there but not shown."""
    data = bytearray(path.read_bytes())
    entry = data.find(b"elst") + 4 + 4 + 4  # version 0: duration (in the movie's time scale), media time, rate
    movie = data.find(b"mvhd") + 4
    time_scale = struct.unpack(">I", data[movie + 12 : movie + 16])[0]
    data[entry : entry + 4] = struct.pack(">I", round(frames * time_scale / fps))
    path.write_bytes(data)


def write_planes(
    path: Path,
    frames: Sequence[Sequence[np.ndarray]],
    *,
    pixels: str,
    codec: str = "ffv1",
    times_ms: Sequence[int] | None = None,
    options: Mapping[str, str] | None = None,
    **context: Any,
) -> Path:
    """A file of exact levels: for each frame the planes of a pixel format, uint8 or uint16; ffv1 loses nothing.

    Args:
        path: Its suffix is the container.
        frames: One array [height, width] for each plane of each frame.
        pixels: FFmpeg's name of the pixel format.
        codec: FFmpeg's name of the encoder.
        times_ms: Milliseconds at which frames are shown; None: 16 per second.
        options: Of the encoder.
        context: Attributes of the encoder's context, such as colorspace; what the stream says of its pixels.
    """
    height, width = frames[0][0].shape[:2]
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=Fraction(16), options=dict(options or {}))
        stream.width, stream.height, stream.pix_fmt = width, height, pixels
        if times_ms is not None:
            stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        for name, value in context.items():
            setattr(stream.codec_context, name, value)
        for index, planes in enumerate(frames):
            frame = av.VideoFrame(width, height, pixels)
            for plane, levels in zip(frame.planes, planes, strict=True):
                padded = np.zeros((plane.height, plane.line_size // levels.itemsize), dtype=levels.dtype)
                padded[:, : levels[0].size] = levels.reshape(len(levels), -1)
                plane.update(padded.tobytes())
            for name in ("colorspace", "color_range", "color_primaries", "color_trc"):
                if name in context:
                    setattr(frame, name, context[name])
            if times_ms is not None:
                frame.pts, frame.time_base = times_ms[index], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def set_display_matrix(path: Path, a: int, b: int, c: int, d: int) -> None:
    """Write the display matrix of an mp4 file's track: pixel (x, y) is shown at (a x + c y, b x + d y)."""
    data = bytearray(path.read_bytes())
    header = data.find(b"tkhd") + 4
    matrix = header + 4 + (20 if data[header] == 0 else 32) + 16
    data[matrix : matrix + 36] = struct.pack(">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    path.write_bytes(data)


def box(kind: bytes, content: bytes) -> bytes:
    """A box of an mp4 file."""
    return struct.pack(">I4s", 8 + len(content), kind) + content


def insert_box(path: Path, content: bytes, *, kind: bytes) -> None:
    """Add a box to the first h264 sample entry of an mp4 file whose index comes last, and lengthen all boxes around it."""
    data = bytearray(path.read_bytes())
    entry = data.find(b"avc1", data.find(b"stsd")) - 4
    added = box(kind, content)
    around = [
        data.find(name, data.find(b"moov")) - 4 for name in (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"stsd")
    ]
    end = entry + struct.unpack_from(">I", data, entry)[0]
    for start in (*around, entry):
        struct.pack_into(">I", data, start, struct.unpack_from(">I", data, start)[0] + len(added))
    data[end:end] = added
    path.write_bytes(data)


def write_changing(path: Path, parts: Sequence[Frames], *, fps: int = 16) -> Path:
    """One VP8 stream whose frames change their size from part to part, as those of a video call do."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libvpx", rate=fps)
        stream.height, stream.width, stream.pix_fmt = parts[0].shape[1], parts[0].shape[2], "yuv420p"
        shown = 0
        for frames in parts:
            encoder = av.CodecContext.create("libvpx", "w")
            encoder.height, encoder.width, encoder.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
            encoder.time_base = Fraction(1, fps)
            for picture in [*frames, None]:
                frame = None if picture is None else av.VideoFrame.from_ndarray(picture, format="rgb24")
                for packet in encoder.encode(frame):
                    packet.stream = stream
                    packet.pts = packet.dts = shown
                    packet.time_base = Fraction(1, fps)
                    container.mux(packet)
                    shown += 1
    return path
