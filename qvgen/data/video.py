"""Write video files: uint8 RGB frames [F, H, W, 3] -> mp4; :mod:`qvgen.data.video_reader` reads them.

Written is h264 in mp4 with 4:2:0 chroma, the one combination that every browser plays. Colours go through the
BT.709 matrix with limited range, and the stream says so; a player that has to guess takes BT.601 for small frames and
shifts saturated colours by 10 to 24 levels. Tiny videos are enlarged by repeating pixels before they are
encoded: they become visible, and a block of equal pixels loses nothing to the halved chroma.

    frame [16, 16, 3]  --x16-->  [256, 256, 3]  --BT.709, 4:2:0-->  Y [256, 256], Cb and Cr [128, 128]

Accepted error, written then read: <= 4 levels inside areas of one colour; PSNR >= 30 dB on saturated colour edges, where
chroma is interpolated. The bytes depend on the frames alone (one encoder thread, no dates in the file).

Left out: sound.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc
from jaxtyping import UInt8

from qvgen.run_directory import atomic_write

Frames = UInt8[np.ndarray, "frames height width 3"]

MIN_VIEWABLE_HEIGHT_PIXELS = 256
"""Videos below this height are enlarged unless a scale is given."""

ARCHIVE_CRF = 12
"""Constant rate factor of files (0 lossless .. 51); RMS error 1.8 levels on a smooth video."""

EMBEDDED_CRF = 20
"""Constant rate factor of videos in a report: RMS error 2.0 levels on that video, a quarter to half of the bytes."""

_LABEL_HEIGHT_PIXELS = 32
_GAP_PIXELS = 8
_BACKGROUND = (24, 24, 27)
_INK = (244, 244, 245)


def _check_frames(frames: Frames) -> Frames:
    """Return the frames as an array (a CPU tensor is taken too) or say what is wrong with them."""
    array = np.asarray(frames)
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[-1] != 3 or 0 in array.shape:
        raise ValueError(
            f"frames are {array.dtype} {list(array.shape)}, not uint8 [frames, height, width, 3] with a frame or more; "
            "pass one video, RGB with channels last, in 0..255"
        )
    return array


def viewable_scale(height: int) -> int:
    """Smallest whole factor that makes a video of this height (pixels) at least 256 pixels high.

    >>> viewable_scale(16), viewable_scale(100), viewable_scale(480)
    (16, 3, 1)
    """
    return max(1, -(-MIN_VIEWABLE_HEIGHT_PIXELS // height))


def upscale(frames: Frames, *, scale: int) -> Frames:
    """Repeat every pixel ``scale`` times in both directions: uint8 [F, H, W, 3] -> [F, H*scale, W*scale, 3].

    Raises:
        ValueError: scale is below 1.
    """
    if scale < 1:
        raise ValueError(f"scale={scale} must be a whole number >= 1; use 1 to keep the size")
    frames = _check_frames(frames)
    return frames if scale == 1 else frames.repeat(scale, axis=1).repeat(scale, axis=2)


def encode_video_bytes(frames: Frames, *, fps: float, scale: int | None = None, crf: int = EMBEDDED_CRF) -> bytes:
    """Encode a video as mp4 in memory.

    Args:
        frames: uint8 [F, H, W, 3], RGB.
        fps: frames per second, > 0.
        scale: whole enlargement by repeated pixels; None takes :func:`viewable_scale`.
        crf: the encoder's constant rate factor, smaller is better and larger in bytes.

    Returns:
        The file's bytes. Size H*scale x W*scale; an odd side gets its last row or column twice, because 4:2:0 halves
        both sides.

    Raises:
        ValueError: frames of another dtype or shape, fps or scale out of range.
    """
    if not fps > 0:
        raise ValueError(f"fps={fps} must be positive")
    frames = _check_frames(frames)
    frames = upscale(frames, scale=viewable_scale(frames.shape[1]) if scale is None else scale)
    odd_rows, odd_columns = frames.shape[1] % 2, frames.shape[2] % 2
    frames = np.pad(frames, ((0, 0), (0, odd_rows), (0, odd_columns), (0, 0)), mode="edge")
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        # One thread: x264 decides differently for each thread count, and the bytes should not depend on the machine.
        stream = container.add_stream(
            "libx264", rate=Fraction(fps).limit_denominator(1001), options={"crf": str(crf), "threads": "1"}
        )
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        context = stream.codec_context
        context.color_range = ColorRange.MPEG
        context.colorspace = Colorspace.ITU709
        context.color_primaries = ColorPrimaries.BT709
        context.color_trc = ColorTrc.BT709
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24").reformat(
                format="yuv420p",
                src_colorspace=Colorspace.ITU709,
                dst_colorspace=Colorspace.ITU709,
                src_color_range=ColorRange.JPEG,
                dst_color_range=ColorRange.MPEG,
                threads=1,  # a pool for each frame takes longer, and on a busy machine much longer, than the frame
            )
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    return buffer.getvalue()


def write_video(path: Path | str, frames: Frames, *, fps: float, scale: int | None = None) -> Path:
    """Write a video to an mp4 file: whole or not at all (written beside the target, then renamed).

    Args:
        path: the file; its folder is made if it is missing.
        frames: uint8 [F, H, W, 3], RGB.
        fps: frames per second, > 0.
        scale: whole enlargement by repeated pixels; None makes it at least 256 pixels high, 1 keeps the size.

    Returns:
        The path.

    Raises:
        ValueError: the name does not end in .mp4, or as :func:`encode_video_bytes`.
        OSError: the file cannot be written.
    """
    path = Path(path)
    if path.suffix.lower() != ".mp4":
        raise ValueError(f"{path} does not end in .mp4, the only format that is written; rename it")
    data = encode_video_bytes(frames, fps=fps, scale=scale, crf=ARCHIVE_CRF)
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, data)
    return path


def side_by_side(videos: Sequence[Frames], labels: Sequence[str], *, scale: int | None = None) -> Frames:
    """Put videos next to each other, each under its label.

    Args:
        videos: n arrays uint8 [F, H, W, 3] of one shape.
        labels: n short texts.
        scale: whole enlargement; None takes :func:`viewable_scale`. The labels keep their size.

    Returns:
        uint8 [F, 32 + H*scale, n*W*scale + 8*(n - 1), 3]: a dark strip of labels above, dark gaps between.

    Raises:
        ValueError: no video, shapes that differ, or another number of labels.
    """
    from PIL import Image, ImageDraw, ImageFont

    videos = [_check_frames(video) for video in videos]
    shapes = sorted({video.shape for video in videos})
    if len(shapes) != 1 or len(labels) != len(videos):
        raise ValueError(
            f"{len(videos)} videos of shapes {shapes} and {len(labels)} labels; "
            "pass at least one video, all of one shape, and one label for each"
        )
    num_frames, height, _, _ = shapes[0]
    enlarged = [upscale(video, scale=viewable_scale(height) if scale is None else scale) for video in videos]
    _, tile_height, tile_width, _ = enlarged[0].shape
    width = len(videos) * tile_width + (len(videos) - 1) * _GAP_PIXELS
    canvas = np.empty((num_frames, _LABEL_HEIGHT_PIXELS + tile_height, width, 3), dtype=np.uint8)
    canvas[:] = _BACKGROUND
    for index, (video, label) in enumerate(zip(enlarged, labels, strict=True)):
        left = index * (tile_width + _GAP_PIXELS)
        # Each label on its own tile: a long one is cut at the tile's edge instead of running into the next.
        tile = Image.new("RGB", (tile_width, _LABEL_HEIGHT_PIXELS), _BACKGROUND)
        ImageDraw.Draw(tile).text((6, 6), label, fill=_INK, font=ImageFont.load_default(size=16))
        columns = slice(left, left + tile_width)
        canvas[:, :_LABEL_HEIGHT_PIXELS, columns] = np.asarray(tile)
        canvas[:, _LABEL_HEIGHT_PIXELS:, columns] = video
    return canvas
