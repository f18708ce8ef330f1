"""A video inside of a page: mp4 and first frame, both as base64."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass

import numpy as np

from qvgen.data.video import Frames, encode_video_bytes, upscale, viewable_scale


@dataclass(frozen=True, kw_only=True)
class ShownVideo:
    """One tile.

    Attributes:
        label: what stands under it.
        mp4_base64: the video.
        poster_base64: its first frame as JPEG: a browser without h264, or a printed page, shows at least this.
        psnr_db: to the teacher's video; None for the teacher itself, or without one.
    """

    label: str
    mp4_base64: str
    poster_base64: str
    psnr_db: float | None


def shown_video(frames: Frames, *, label: str, fps: float, psnr_db: float | None) -> ShownVideo:
    """Make a tile of a video, uint8 [F, H, W, 3]; raises ValueError for other frames."""
    return ShownVideo(
        label=label,
        mp4_base64=base64.b64encode(encode_video_bytes(frames, fps=fps)).decode(),
        poster_base64=_poster_base64(frames),
        psnr_db=psnr_db,
    )


def _poster_base64(frames: Frames) -> str:
    from PIL import Image

    first = upscale(np.asarray(frames)[:1], scale=viewable_scale(np.asarray(frames).shape[1]))[0]
    buffer = io.BytesIO()
    Image.fromarray(first).save(buffer, format="JPEG", quality=85)
    return base64.b64encode(buffer.getvalue()).decode()
