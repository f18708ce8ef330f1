"""A video inside of a page: mp4 and first frame, both as base64."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np

from qvgen.data.video import Frames, encode_video_bytes, upscale, viewable_scale
from qvgen.evaluation.report.verdict import LIMITS, Level


@dataclass(frozen=True, kw_only=True)
class ShownVideo:
    """One tile of a page: a video and the words under it.

    Attributes:
        label: what stands under it.
        mp4_base64: the video.
        poster_base64: its first frame as JPEG: a browser without h264, or a printed page, shows at least this.
        psnr_db: PSNR to the teacher's video; None for the teacher itself, or without one.
        note: words that stand in place of the PSNR.
    """

    label: str
    mp4_base64: str
    poster_base64: str
    psnr_db: float | None
    note: str

    @property
    def level(self) -> Level | None:
        """The verdict on the PSNR."""
        return None if self.psnr_db is None else LIMITS["psnr_db"].level(self.psnr_db)


def shown_video(
    frames: Frames, *, label: str, fps: float, psnr_db: float | None, note: str = "full precision"
) -> ShownVideo:
    """Make a tile of a video, uint8 [F, H, W, 3]; raises ValueError for other frames."""
    return ShownVideo(
        label=label,
        mp4_base64=base64.b64encode(encode_video_bytes(frames, fps=fps)).decode(),
        poster_base64=_poster_base64(frames),
        psnr_db=psnr_db,
        note=note,
    )


def stored_video(path: Path, *, label: str, note: str) -> ShownVideo:
    """Make a tile of an mp4 file as it is; raises ValueError for one without a frame, OSError for one that is not there."""
    content = path.read_bytes()
    return ShownVideo(
        label=label,
        mp4_base64=base64.b64encode(content).decode(),
        poster_base64=_poster_base64(_first_frame(content, path)),
        psnr_db=None,
        note=note,
    )


def _first_frame(content: bytes, path: Path) -> Frames:
    """The first frame alone, uint8 [1, H, W, 3]."""
    try:
        with av.open(io.BytesIO(content)) as container:
            for frame in container.decode(video=0):
                return frame.to_ndarray(format="rgb24")[None]
    except (av.FFmpegError, IndexError) as error:
        raise ValueError(f"{path} is no video that can be shown ({type(error).__name__})") from error
    raise ValueError(f"{path} holds no frame")


def _poster_base64(frames: Frames) -> str:
    from PIL import Image

    first = upscale(np.asarray(frames)[:1], scale=viewable_scale(np.asarray(frames).shape[1]))[0]
    buffer = io.BytesIO()
    Image.fromarray(first).save(buffer, format="JPEG", quality=85)
    return base64.b64encode(buffer.getvalue()).decode()
