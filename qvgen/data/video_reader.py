"""Chosen frames of one video file, and what the file is: frames, rate, size.

    path --(PyAV reads the packets' headers)--> VideoInfo --choose--> indices --(decord, else PyAV)--> uint8 [n, H, W, 3]

Measured on files in 20 containers, decord gives wrong frames in silence in two cases, and is not asked there:

    not mp4/mov or mkv/webm   seeking in mpg, vob, asf, wmv: almost every frame is another one than PyAV's
    frames not *shown*        an edit list takes them out, decord counts them and repeats the last one shown
                              (a trimmed file of 149 frames gave 138 copies of frame 148)

PyAV reads those, and what decord can't read at all (AV1, GIF); Pillow reads animated WebP. Frames are turned upright where
the file carries a rotation, as players do.

A file can still hang a decoder: :mod:`qvgen.data.probe` runs this in a process of its own with a time limit.

Left out: a varying frame rate (its average is used), sound, second video streams.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from qvgen.data.video import Frames

SEEKABLE = {"mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm"}
"""Containers (FFmpeg's names) in which decord finds the frames that it is asked for."""

EXACT_COUNT = "mov,mp4,m4a,3gp,3g2,mj2"
"""The container whose header tells exactly how many frames the whole file has."""

Choose = Callable[["VideoInfo"], Sequence[int]]
"""From what a file is to the indices of the frames that are wanted, ascending."""


@dataclass(frozen=True, kw_only=True)
class VideoInfo:
    """What a video file is.

    Attributes:
        num_frames: Frames that a player shows.
        fps: Frames per second, the average.
        height: Pixels, upright.
        width: Pixels, upright.
        codec: Its name.
        container: FFmpeg's name for the file's format.
    """

    num_frames: int
    fps: Fraction
    height: int
    width: int
    codec: str
    container: str


def probe_video(path: Path | str) -> VideoInfo:
    """What a video file is, from its headers (animated WebP: from its pictures).

    Raises:
        OSError: There is no such file, or it can't be read.
        ValueError: It is no video, or it is cut off.
    """
    path = _existing(path)
    return _webp_info(path) if _is_webp(path) else _probe_container(path)[0]


def read_frames(path: Path | str, choose: Choose) -> tuple[VideoInfo, Frames]:
    """Read some frames of a video file.

    Args:
        path: Any file that decord, PyAV or Pillow decodes.
        choose: Called once with what the file is; returns the indices to read, ascending. What it raises is passed on.

    Returns:
        What the file is, and uint8 [n, H, W, 3], RGB, upright.

    Raises:
        OSError: There is no such file, or it can't be read.
        ValueError: It is no video, it is cut off, or its frames can't be decoded.
    """
    path = _existing(path)
    if _is_webp(path):
        info = _webp_info(path)
        return info, _read_webp(path, choose(info))
    info, rotation = _probe_container(path)
    indices = choose(info)
    frames = _read_with_decord(path, indices, info=info)
    if frames is None:
        frames = _read_with_av(path, indices, quarter_turns=rotation // 90)
    return info, frames


def _existing(path: Path | str) -> Path:
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no video file at {path}")
    return path


def _probe_container(path: Path) -> tuple[VideoInfo, int]:
    """What the container says, and how many degrees its frames must be turned counter-clockwise."""
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            packets = [(packet.pts, packet.is_discard) for packet in container.demux(stream) if packet.size]
            stated, time_base, average = stream.frames, stream.time_base, stream.average_rate
            codec, form = stream.codec_context.name, container.format.name
        with av.open(str(path)) as container:  # again from the start: not every format can be rewound
            first = next(container.decode(video=0))
            turn = round(first.rotation / 90) * 90
            height, width = (first.width, first.height) if turn % 180 else (first.height, first.width)
    except (av.FFmpegError, IndexError, StopIteration) as error:
        raise ValueError(f"{path} holds no frame that can be decoded; is it a whole video file?") from error
    if form == EXACT_COUNT and len(packets) < stated:
        raise ValueError(f"{path} is cut off after {len(packets)} of {stated} frames")
    shown = [pts for pts, is_discarded in packets if not is_discarded]
    fps = _rate(shown, time_base=time_base, stated=average)
    info = VideoInfo(num_frames=len(shown), fps=fps, height=height, width=width, codec=codec, container=form)
    return info, turn


def _rate(shown: Sequence[int | None], *, time_base: Fraction | None, stated: Fraction | None) -> Fraction:
    """Frames per second: what the file states, unless its time stamps differ from that by 1 % or more."""
    times = [pts for pts in shown if pts is not None]
    if time_base and len(times) == len(shown) and len(times) > 1 and max(times) > min(times):
        measured = (len(times) - 1) / ((max(times) - min(times)) * time_base)
        if stated and abs(stated / measured - 1) < Fraction(1, 100):
            return stated
        return measured
    return stated or Fraction(1)


def _read_with_decord(path: Path, indices: Sequence[int], *, info: VideoInfo) -> Frames | None:
    """The frames, or None where decord is missing, fails, or could give other frames than those asked for."""
    if info.container not in SEEKABLE:
        return None
    try:
        import decord
    except ImportError:  # no wheel for this platform
        return None
    decord.logging.set_level(decord.logging.QUIET)  # what matters is reported by us, with the file's name
    try:
        reader = decord.VideoReader(str(path), num_threads=1)
        if len(reader) != info.num_frames:
            return None
        frames = np.asarray(reader.get_batch(list(indices)).asnumpy())
    except (decord.DECORDError, RuntimeError):  # a codec that it does not have, a frame that it can't decode
        return None
    return frames if frames.shape[1:] == (info.height, info.width, 3) else None


def _read_with_av(path: Path, indices: Sequence[int], *, quarter_turns: int) -> Frames:
    wanted, last = set(indices), max(indices)
    found: dict[int, np.ndarray] = {}
    index = -1
    try:
        with av.open(str(path)) as container:
            for index, frame in enumerate(container.decode(video=0)):
                if index in wanted:
                    found[index] = np.rot90(frame.to_ndarray(format="rgb24"), k=quarter_turns)
                if index >= last:
                    break
    except av.FFmpegError as error:
        raise ValueError(f"{path} can't be decoded after frame {index}: {error.strerror}") from error
    if index < last:
        raise ValueError(f"{path} ends after {index + 1} frames that can be decoded; frame {last} is needed")
    return np.stack([found[index] for index in indices])


def _is_webp(path: Path) -> bool:
    with path.open("rb") as file:
        head = file.read(12)
    return head[:4] == b"RIFF" and head[8:] == b"WEBP"


def _webp_info(path: Path) -> VideoInfo:
    """Size, number and mean duration of an animation's pictures; Pillow knows a duration only once it is decoded."""
    from PIL import Image

    durations_ms = []
    try:
        with Image.open(path) as picture:
            size, count = picture.size, int(getattr(picture, "n_frames", 1))
            for index in range(count):
                picture.seek(index)
                picture.load()
                durations_ms.append(int(picture.info.get("duration", 0)))
    except (OSError, EOFError, SyntaxError, ValueError) as error:
        raise ValueError(f"{path} can't be decoded after picture {len(durations_ms)}: {error}") from error
    total_ms = sum(durations_ms)
    fps = Fraction(1000 * count, total_ms) if total_ms else Fraction(1)
    return VideoInfo(num_frames=count, fps=fps, height=size[1], width=size[0], codec="webp", container="webp")


def _read_webp(path: Path, indices: Sequence[int]) -> Frames:
    from PIL import Image

    frames = []
    with Image.open(path) as picture:
        for index in indices:
            picture.seek(index)
            frames.append(np.asarray(picture.convert("RGB")))
    return np.stack(frames)
