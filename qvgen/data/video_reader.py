"""Chosen frames of one video file, and what the file is: frames, times, size, how its pixels are to be shown.

    path --(PyAV reads the packets' headers and one frame)--> VideoInfo --choose--> indices --(PyAV)--> uint8 [n, H, W, 3]

Everything that container and stream say about pixels and times is honoured, or the file is refused with the reason:

    video_stream     which stream, which of its frames are shown and when, the aspect of a pixel
    frame_time       whether they are evenly spaced
    frame_format     matrix, range, primaries, transfer, orientation, alpha, interlacing; the frame as RGB
    container_header cropping by the container, and edits that change the speed

Frames are found by their time stamps. In mp4, mov, mkv and webm the decoder starts at the key frame before the first one;
seeking in mpg, vob, asf, wmv gives other frames, so those are decoded from their beginning. FFmpeg applies the stream's own
cropping and film grain. Pillow reads animated WebP.

A file can still hang a decoder: :mod:`qvgen.data.clip_process` runs this in a process of its own with a time limit.

Left out: sound.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.format import Flags as FormatFlags

from qvgen.data.container_header import Crop, VideoHeader, read_video_headers
from qvgen.data.frame_format import FrameFormat, Picture, read_format, to_rgb
from qvgen.data.frame_time import read_timing
from qvgen.data.video import Frames
from qvgen.data.video_stream import (
    PacketTimes,
    choose_stream,
    counted_times,
    frame_times,
    is_shown,
    raw_rate,
    refuse_stream,
    stored_aspect,
    upright_aspect,
)
from qvgen.data.webp_animation import is_webp, probe_webp, read_webp

READER = 2
"""Version of the reader, raised whenever the same file may give other frames or be refused for another reason: every clip is
looked at again then."""

SEEKABLE = {"mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm"}
"""Containers (FFmpeg's names) in which a decoder can start at a key frame."""

EXACT_COUNT = "mov,mp4,m4a,3gp,3g2,mj2"
"""The container whose header tells exactly how many frames the whole file has."""

Choose = Callable[["VideoInfo"], Sequence[int]]
"""From what a file is to the indices of the frames that are wanted, ascending."""


@dataclass(frozen=True, kw_only=True)
class VideoInfo:
    """The properties of a video file.

    Attributes:
        num_frames: Frames that a player shows.
        fps: Frames per second, the average.
        height: Pixels, upright.
        width: Pixels, upright.
        codec: Its name.
        container: FFmpeg's name for the file's format.
        pixel_aspect: Width of a pixel, upright, in units of its height.
        times_s: Seconds at which the frames are shown, from the first one's; None where they are evenly spaced.
        treatment: How the frames differ from what release 1 of the reader made of them; empty where they do not.
    """

    num_frames: int
    fps: Fraction
    height: int
    width: int
    codec: str
    container: str
    pixel_aspect: Fraction = Fraction(1)
    times_s: tuple[float, ...] | None = None
    treatment: str = ""


@dataclass(frozen=True, kw_only=True)
class _Source:
    """The values by which a file's frames are decoded again.

    Attributes:
        info: Properties of the file.
        number: The stream's, among the video streams.
        form: Format that its frames have in common.
        aspect: Width of a stored pixel by its height.
        crop: Crop of stored frames that the container asks for.
        stamps: Time stamp of each shown frame, ascending; None where the file has none: frames are counted.
    """

    info: VideoInfo
    number: int
    form: FrameFormat
    aspect: Fraction
    crop: Crop
    stamps: tuple[int, ...] | None


def probe_video(path: Path | str) -> VideoInfo:
    """The properties of a video file, from its headers and first frame (animated WebP: from its pictures).

    Raises:
        OSError: There is no such file, or it can't be read.
        ValueError: It is no video, it is cut off, or its pixels can't be shown on an ordinary display.
    """
    path = _existing(path)
    return _webp_info(path) if is_webp(path) else _probe_container(path).info


def read_frames(path: Path | str, choose: Choose) -> tuple[VideoInfo, Frames]:
    """Read some frames of a video file.

    Args:
        path: Any file that PyAV or Pillow decodes.
        choose: Called once with what the file is; returns the indices to read, ascending. What it raises is passed on.

    Returns:
        What the file is, and uint8 [n, H, W, 3], RGB, upright.

    Raises:
        OSError: There is no such file, or it can't be read.
        ValueError: See :func:`probe_video`; or its frames can't be decoded or used.
    """
    path = _existing(path)
    if is_webp(path):
        info = _webp_info(path)
        return info, read_webp(path, choose(info))
    source = _probe_container(path)
    return source.info, _read(path, choose(source.info), source=source)


def read_video(path: Path | str) -> Frames:
    """All frames of a video file, uint8 [F, H, W, 3]; raises what :func:`read_frames` raises."""
    return read_frames(path, lambda info: range(info.num_frames))[1]


def _existing(path: Path | str) -> Path:
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no video file at {path}")
    return path


def _webp_info(path: Path) -> VideoInfo:
    count, timing, (height, width) = probe_webp(path)
    kind = {"codec": "webp", "container": "webp"}
    return VideoInfo(num_frames=count, fps=timing.fps, height=height, width=width, times_s=timing.times_s, **kind)


def _probe_container(path: Path) -> _Source:
    """Read the packets' headers and the first frame."""
    try:
        with av.open(str(path)) as container:
            number = choose_stream(container, path)
            stream = container.streams.video[number]
            packets = [PacketTimes.of(packet) for packet in container.demux(stream) if is_shown(packet)]
            stated, rate, tick = stream.frames, stream.average_rate, stream.time_base or Fraction(1, 1000)
            form_name, codec = container.format.name, stream.codec_context.name
            several = f"stream {number}" if len(container.streams.video) > 1 else ""
            is_raw, own_rate = bool(container.format.flags & FormatFlags.no_timestamps.value), raw_rate(stream)
        if form_name == EXACT_COUNT and len(packets) < stated:
            raise ValueError(f"{path} is cut off after {len(packets)} of {stated} frames")
        with av.open(str(path)) as container:  # again from the start: not every format can be rewound
            stream = container.streams.video[number]
            first = next(container.decode(stream))
            form, aspect = read_format(first), stored_aspect(stream)
            header = dict(enumerate(read_video_headers(path))).get(number, VideoHeader())
            refusal = refuse_stream(stream) or form.refusal or header.refusal
    except (av.FFmpegError, StopIteration) as error:
        raise ValueError(f"{path} holds no frame that can be decoded; is it a whole video file?") from error
    try:
        if refusal:
            raise ValueError(refusal)
        shown = [packet for packet in packets if not packet.is_discarded]
        times, stamps = (
            (counted_times(len(shown), rate=own_rate), None)
            if is_raw
            else frame_times(shown, first=first.pts, tick=tick, rate=rate)
        )
        timing = read_timing(times, tick=tick, stated=rate)
    except ValueError as error:
        raise ValueError(f"{path} {error}") from error
    crop = header.crop(height=form.height, width=form.width)
    height, width = form.height - crop.top - crop.bottom, form.width - crop.left - crop.right
    info = VideoInfo(
        num_frames=len(times),
        fps=timing.fps,
        height=width if form.turn[0] else height,
        width=height if form.turn[0] else width,
        codec=codec,
        container=form_name,
        pixel_aspect=upright_aspect(aspect, form),
        times_s=timing.times_s,
        treatment=", ".join(filter(None, [form.treatment, f"{crop}" if crop else "", several])),
    )
    return _Source(info=info, number=number, form=form, aspect=aspect, crop=crop, stamps=stamps)


def _read(path: Path, indices: Sequence[int], *, source: _Source) -> Frames:
    """The frames of these indices.

    Raises:
        ValueError: One can't be decoded or used.
    """
    info, stamps = source.info, source.stamps
    wanted = [stamps[index] for index in indices] if stamps is not None else list(indices)
    if stamps is not None and any(stamps.count(stamp) > 1 for stamp in wanted):
        raise ValueError(f"{path} has several frames with one time stamp; encode it anew")
    can_seek = stamps is not None and info.container in SEEKABLE
    found = _find(path, set(wanted), source=source, seek=can_seek)
    if len(found) < len(wanted) and can_seek:
        found = _find(path, set(wanted), source=source, seek=False)
    for index, key in zip(indices, wanted, strict=True):
        if key not in found:
            raise ValueError(
                f"{path} can't be decoded at frame {index} of {info.num_frames}; is it a whole video file?"
            )
    return np.stack([found[key] for key in wanted])


def _find(path: Path, wanted: set[int], *, source: _Source, seek: bool) -> dict[int, Picture]:
    """Frames by time stamp (or by number, where there are no stamps): those that could be decoded."""
    pictures: dict[int, Picture] = {}
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[source.number]
            if seek:
                container.seek(min(wanted), stream=stream)
            for number, frame in enumerate(container.decode(stream)):
                key = number if source.stamps is None else frame.pts
                if key not in wanted:
                    continue
                if stored_aspect(stream) != source.aspect:
                    raise ValueError("changes the aspect of its pixels in mid-stream; cut it there")
                pictures[key] = to_rgb(frame, source.form, crop=source.crop)
                if len(pictures) == len(wanted):
                    break
    except av.FFmpegError as error:
        raise ValueError(f"{path} can't be decoded after {len(pictures)} of the frames: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{path} {error}") from error
    return pictures
