"""The format that a decoded frame gives for its pixels, and the frame as an ordinary display (BT.709, sRGB) shows it.

    YCbCr --matrix, range--> R'G'B' --transfer--> linear --primaries to BT.709--> linear --transfer--> R'G'B' uint8, upright

Each is what the stream says. Where it says nothing:

    matrix      that of its primaries; else BT.709 where the longer side has 1280 pixels or the shorter more than 576, else
                BT.601, as players guess
    range       limited (16..235); full for RGB, for grey and for the yuvj formats
    primaries   BT.2020 where the matrix is, else BT.709; the two of BT.601 are taken for BT.709, as browsers do

Refused, by :attr:`FrameFormat.refusal`: HDR (PQ, HLG, Dolby Vision alone), linear and logarithmic levels, rare matrices and
primaries, colour profiles, two views in one picture, panoramas, rotations by other than quarter turns. By :func:`to_rgb`, of
the frames that are used alone: interlaced, transparent and damaged ones.

Accepted error: 3 levels (8-bit 4:2:0, FFmpeg's fast arithmetic), 0.5 for 4:4:4; 2 more where primaries are converted.

Source: ITU-T H.273 (codes and matrices), BT.709, BT.2020, BT.1886 (display gamma 2.4), IEC 61966-2-1 (sRGB).
"""

from __future__ import annotations

import io
import struct
from dataclasses import dataclass

import av
import numpy as np
from av.sidedata.sidedata import Type
from av.video.reformatter import ColorRange
from jaxtyping import UInt8

from qvgen.data.container_header import Crop
from qvgen.data.display_color import BT709, WIDE, to_bt709

Picture = UInt8[np.ndarray, "height width 3"]

_BT601 = 5
_BT2020 = 9
_MATRICES = {1: "BT.709", 4: "FCC", 5: "BT.601", 6: "BT.601", 7: "SMPTE 240M", 9: "BT.2020"}
_REFUSED_MATRICES = {
    8: "YCgCo",
    10: "BT.2020 with constant luminance",
    11: "SMPTE 2085",
    12: "chromaticity-derived",
    13: "chromaticity-derived with constant luminance",
    14: "ICtCp",
    15: "IPT-C2",
    16: "YCgCo-R",
    17: "YCgCo-R",
}
_LIKE_BT709 = {1, 5, 6, 7, 22}
"""Primaries that are taken for BT.709: its own, those of BT.601 and SMPTE 240M, and EBU 3213."""
_REFUSED_PRIMARIES = {4: "BT.470 M", 8: "film", 10: "CIE XYZ", 11: "DCI-P3 with the cinema's white"}
_HDR = {16: "PQ, SMPTE 2084", 18: "HLG, ARIB STD-B67"}
_REFUSED_TRANSFERS = {8: "linear", 9: "logarithmic", 10: "logarithmic", 17: "SMPTE 428"}
_UNSPECIFIED = {0, 2, 3}
_LARGE_LONG_SIDE, _SMALL_SHORT_SIDE = 1280, 576


@dataclass(frozen=True, kw_only=True)
class FrameFormat:
    """The format that all used frames of a clip must have in common.

    Attributes:
        height: Pixels as stored, before turning.
        width: Pixels as stored.
        pixels: FFmpeg's name of the pixel format.
        bits: Bits of its deepest component.
        matrix: H.273 code of the matrix that is used; 0 for RGB, palettes and grey.
        matrix_from: Where the matrix was taken from: ``stream``, ``primaries`` or ``size``; empty where there is none.
        full_range: Whether levels fill 0 .. 2^bits - 1.
        primaries: H.273 code of the primaries that are used.
        transfer: H.273 code, as the stream says.
        turn: (transpose, then mirror left and right, then mirror top and bottom) that puts the frame upright.
        refusal: Why its frames can't be used, as the end of a sentence on the file; empty where they can.
    """

    height: int
    width: int
    pixels: str
    bits: int
    matrix: int
    matrix_from: str
    full_range: bool
    primaries: int
    transfer: int
    turn: tuple[bool, bool, bool]
    refusal: str

    @property
    def treatment(self) -> str:
        """How the frames differ from what release 1 of the reader made of them; empty where they do not.

        It is part of a clip's content key: latents of clips that were read right are found again.
        """
        parts = []
        if self.matrix_from in ("size", "primaries") and self.matrix != _BT601:
            parts.append(f"matrix {self.matrix}")
        if self.primaries in WIDE:
            parts.append(f"primaries {self.primaries} transfer {self.transfer}")
        if self.bits > 8:
            parts.append(f"{self.bits} bits")
        if self.is_grey and not self.full_range:
            parts.append("grey 16..235")
        if self.turn not in _ROTATIONS:
            parts.append(f"mirrored {self.turn}")
        return ", ".join(parts)

    @property
    def is_grey(self) -> bool:
        """Whether there is no colour: luma alone, or with alpha."""
        return self.pixels.startswith(("gray", "ya"))


def read_format(frame: av.VideoFrame) -> FrameFormat:
    """The format that a frame gives for its pixels."""
    name, stored, range_ = frame.format.name, int(frame.colorspace), int(frame.color_range)
    has_matrix = not frame.format.is_rgb and len(frame.format.components) >= 3  # not grey, nor with a palette
    matrix, source = _matrix(frame) if has_matrix else (0, "")
    full = name.startswith("yuvj") or range_ == ColorRange.JPEG
    primaries, transfer = int(frame.color_primaries), int(frame.color_trc)
    if primaries in _UNSPECIFIED:
        primaries = _BT2020 if stored == _BT2020 else BT709
    turn = _turn(frame)
    return FrameFormat(
        height=frame.height,
        width=frame.width,
        pixels=name,
        bits=max(component.bits for component in frame.format.components),
        matrix=matrix,
        matrix_from=source,
        full_range=full or frame.format.is_rgb or (not has_matrix and range_ != ColorRange.MPEG),
        primaries=BT709 if primaries in _LIKE_BT709 else primaries,
        transfer=transfer,
        turn=turn or (False, False, False),
        refusal=_refusal(frame, primaries=primaries, transfer=transfer, upright=turn is not None),
    )


def _matrix(frame: av.VideoFrame) -> tuple[int, str]:
    """The matrix of a YCbCr frame, and what it was taken from."""
    stored, primaries = int(frame.colorspace), int(frame.color_primaries)
    if stored not in _UNSPECIFIED:
        return (_BT601 if stored in (5, 6) else stored), "stream"
    if primaries in (1, 5, 6, _BT2020):
        return (_BT601 if primaries in (5, 6) else primaries), "primaries"
    large = max(frame.width, frame.height) >= _LARGE_LONG_SIDE or min(frame.width, frame.height) > _SMALL_SHORT_SIDE
    return (1 if large else _BT601), "size"


def _refusal(frame: av.VideoFrame, *, primaries: int, transfer: int, upright: bool) -> str:
    matrix = int(frame.colorspace)
    side_data = {data.type: bytes(data) for data in frame.side_data}
    if transfer in _HDR:
        return (
            f"is HDR (transfer {_HDR[transfer]}), whose levels no ordinary display shows as they are; "
            "tone-map it to BT.709 first, for example with FFmpeg's filters zscale and tonemap"
        )
    if transfer in _REFUSED_TRANSFERS:
        return f"has {_REFUSED_TRANSFERS[transfer]} levels; convert it to BT.709 first (FFmpeg: -vf zscale=t=bt709)"
    if matrix in _REFUSED_MATRICES and not frame.format.is_rgb:
        return f"has the colour matrix {_REFUSED_MATRICES[matrix]}; convert it to BT.709 first"
    if primaries in _REFUSED_PRIMARIES or not (primaries in _LIKE_BT709 or primaries in WIDE):
        name = _REFUSED_PRIMARIES.get(primaries, f"of code {primaries}")
        return f"has the colour primaries {name}; convert it to BT.709 first (FFmpeg: -vf zscale=p=bt709)"
    if not upright:
        return "is turned by other than quarter turns; turn its pixels first (FFmpeg does when it encodes anew)"
    stereo = side_data.get(Type.STEREO3D)
    if stereo is not None and struct.unpack_from("=i", stereo)[0] != 0:
        return "holds two views in one picture (stereo 3-D); cut one out first (FFmpeg: -vf stereo3d or crop)"
    if Type.SPHERICAL in side_data:
        return "is a panorama on a sphere; make a flat view first (FFmpeg: -vf v360=equirect:flat)"
    if Type.ICC_PROFILE in side_data:
        return refuse_profile(side_data[Type.ICC_PROFILE])
    return ""


def refuse_profile(profile: bytes) -> str:
    """Why a picture with this ICC profile can't be used; empty for sRGB's own."""
    from PIL import ImageCms

    try:
        name = " ".join(ImageCms.getProfileDescription(ImageCms.getOpenProfile(io.BytesIO(profile))).split())
    except (OSError, ImageCms.PyCMSError):
        name = "one that can't be read"
    return "" if "srgb" in name.lower() else f"has a colour profile other than sRGB ({name}); convert it to sRGB first"


_ROTATIONS = {(False, False, False), (True, True, False), (False, True, True), (True, False, True)}


def _turn(frame: av.VideoFrame) -> tuple[bool, bool, bool] | None:
    """How a frame is put upright, from its display matrix; None where that is no quarter turn or mirroring.

    The matrix takes a pixel at (x, y), y downwards, to (a x + c y, b x + d y). Its scale is the pixel's aspect, which FFmpeg
    hands on as such.
    """
    for data in frame.side_data:
        if data.type == Type.DISPLAYMATRIX:
            a, b, _, c, d = struct.unpack_from("=5i", bytes(data))
            if a and d and not b and not c:
                return False, a < 0, d < 0
            if b and c and not a and not d:
                return True, c < 0, b < 0
            return None
    return False, False, False


def _grey_levels(form: FrameFormat) -> UInt8[np.ndarray, " levels"]:
    """Each level of a grey frame in full range: FFmpeg takes all of them for full."""
    levels = np.arange(256)
    return (levels if form.full_range else np.rint(np.clip((levels - 16) * 255 / 219, 0, 255))).astype(np.uint8)


def to_rgb(frame: av.VideoFrame, form: FrameFormat, *, crop: Crop) -> Picture:
    """A frame as uint8 RGB [height, width, 3], upright.

    Args:
        frame: Decoded.
        form: Format of the clip; the frame must have it.
        crop: By the container, of the stored frame.

    Raises:
        ValueError: The frame is interlaced, transparent, damaged or of another format; says so as the end of a sentence.
    """
    own = read_format(frame)
    if own != form:
        changed = [name for name in vars(form) if getattr(own, name) != getattr(form, name)]
        was, now = (", ".join(f"{name} {getattr(side, name)}" for name in changed) for side in (form, own))
        raise ValueError(f"changes in mid-stream from {was} to {now}; cut it there")
    if frame.interlaced_frame:
        raise ValueError("is interlaced; deinterlace it first (FFmpeg: -vf bwdif)")
    if frame.is_corrupt:
        raise ValueError("is damaged")
    has_alpha = form.pixels == "pal8" or any(component.is_alpha for component in frame.format.components)
    if has_alpha and frame.to_ndarray(format="rgba")[..., 3].min() < 255:
        raise ValueError("is transparent in part; put it on a background first")
    if form.is_grey:
        picture = np.repeat(_grey_levels(form)[frame.to_ndarray(format="gray")][..., None], 3, axis=-1)
    elif form.matrix:
        picture = frame.reformat(
            format="rgb24",
            src_colorspace=form.matrix,
            src_color_range=ColorRange.JPEG if form.full_range else ColorRange.MPEG,
            dst_color_range=ColorRange.JPEG,
        ).to_ndarray()
    else:
        picture = frame.to_ndarray(format="rgb24")
    if form.primaries in WIDE:
        picture = to_bt709(picture, primaries=form.primaries, transfer=form.transfer)
    picture = picture[crop.top : form.height - crop.bottom, crop.left : form.width - crop.right]
    transpose, mirror_x, mirror_y = form.turn
    picture = picture.transpose(1, 0, 2) if transpose else picture
    return picture[:: -1 if mirror_y else 1, :: -1 if mirror_x else 1]
