"""The parts of mp4 and Matroska headers that FFmpeg's libraries do not hand on: cropping, and rates of edits.

    mp4, mov     moov/trak(vide)/mdia/minf/stbl/stsd/ENTRY/clap   width, height, offsets of the centre, as fractions
                 moov/trak(vide)/edts/elst                         per edit: duration, media time, rate (16.16)
    mkv, webm    Segment/Tracks/TrackEntry/Video/PixelCrop{Left,Top,Right,Bottom}

A header that can't be parsed says nothing here: FFmpeg, which reads the file as well, reports it.

Source: ISO/IEC 14496-12 (8.6.6, 12.1.4), RFC 9559 (5.1.4.1.28).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO

_VISUAL_ENTRY_BYTES = 78
_MATROSKA_SEGMENT, _MATROSKA_TRACKS, _MATROSKA_ENTRY, _MATROSKA_VIDEO = 0x18538067, 0x1654AE6B, 0xAE, 0xE0
_MATROSKA_CROP = {0x54CC: "left", 0x54BB: "top", 0x54DD: "right", 0x54AA: "bottom"}


@dataclass(frozen=True, kw_only=True)
class Crop:
    """Pixels that are not shown, on each side of a stored frame."""

    left: int = 0
    top: int = 0
    right: int = 0
    bottom: int = 0

    def __bool__(self) -> bool:
        """Whether anything is cut off."""
        return any((self.left, self.top, self.right, self.bottom))


@dataclass(frozen=True, kw_only=True)
class VideoHeader:
    """One video track, as the header describes it.

    Attributes:
        aperture: Fractions width, height, and how far the centre is moved right and down; None: the whole frame.
        sides: Cropping of a Matroska track.
        edit_rates: Speed of each edit that shows something.
    """

    aperture: tuple[Fraction, Fraction, Fraction, Fraction] | None = None
    sides: Crop = Crop()
    edit_rates: tuple[Fraction, ...] = ()

    @property
    def refusal(self) -> str:
        """Why the track can't be used, as the end of a sentence; empty where it can."""
        if any(rate != 1 for rate in self.edit_rates):
            shown = ", ".join(f"{float(rate):g}" for rate in self.edit_rates)
            return f"has an edit list that changes the speed ({shown}); encode it anew as it is to be shown"
        return ""

    def crop(self, *, height: int, width: int) -> Crop:
        """The cropping of a frame of this size: whole pixels that are shown in full are kept."""
        if self.aperture is None:
            return self.sides
        shown_width, shown_height, right, down = self.aperture
        left, top = (width - shown_width) / 2 + right, (height - shown_height) / 2 + down
        if left < 0 or top < 0 or left + shown_width > width or top + shown_height > height:
            return Crop()  # a crop of another size than the frame: nothing could be shown
        return Crop(
            left=math.ceil(left),
            top=math.ceil(top),
            right=math.ceil(width - left - shown_width),
            bottom=math.ceil(height - top - shown_height),
        )


def read_video_headers(path: Path) -> list[VideoHeader]:
    """The video tracks of an mp4, mov, mkv or webm file, in its order; none of other files."""
    with path.open("rb") as file:
        head = file.read(12)
        size = path.stat().st_size
        try:
            if head[:4] == b"\x1aE\xdf\xa3":
                return list(_matroska_tracks(file, size))
            return list(_mp4_tracks(file, size))
        except (struct.error, ZeroDivisionError, EOFError):
            return []


def _boxes(file: BinaryIO, start: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """(kind, begin, end) of the contents of the boxes in a range."""
    while start + 8 <= end:
        file.seek(start)
        size, kind = struct.unpack(">I4s", file.read(8))
        header = 8
        if size == 1:
            size, header = struct.unpack(">Q", file.read(8))[0], 16
        stop = end if size == 0 else start + size
        if (size != 0 and size < header) or stop > end:
            return
        yield kind, start + header, stop
        start = stop


def _inside(file: BinaryIO, range_: tuple[int, int], *path: bytes) -> tuple[int, int] | None:
    """The range of the first box at a path, or None."""
    for kind in path:
        found = next((box[1:] for box in _boxes(file, *range_) if box[0] == kind), None)
        if found is None:
            return None
        range_ = found
    return range_


def _mp4_tracks(file: BinaryIO, size: int) -> Iterator[VideoHeader]:
    movie = _inside(file, (0, size), b"moov")
    for kind, *track in _boxes(file, *movie) if movie else ():
        handler = _inside(file, (track[0], track[1]), b"mdia", b"hdlr") if kind == b"trak" else None
        if handler is None or _read(file, handler)[8:12] != b"vide":
            continue
        whole = (track[0], track[1])
        edits = _inside(file, whole, b"edts", b"elst")
        table = _inside(file, whole, b"mdia", b"minf", b"stbl", b"stsd")
        aperture = None
        if table is not None:
            entry = next(_boxes(file, table[0] + 8, table[1]), None)
            clean = _inside(file, (entry[1] + _VISUAL_ENTRY_BYTES, entry[2]), b"clap") if entry else None
            if clean is not None:
                n = struct.unpack_from(">4IiIiI", _read(file, clean))
                aperture = (Fraction(n[0], n[1]), Fraction(n[2], n[3]), Fraction(n[4], n[5]), Fraction(n[6], n[7]))
        yield VideoHeader(aperture=aperture, edit_rates=_edit_rates(_read(file, edits)) if edits else ())


def _edit_rates(content: bytes) -> tuple[Fraction, ...]:
    version, count = content[0], struct.unpack_from(">I", content, 4)[0]
    form = ">QqI" if version == 1 else ">IiI"
    edits = [struct.unpack_from(form, content, 8 + index * struct.calcsize(form)) for index in range(count)]
    return tuple(Fraction(rate, 1 << 16) for _, media_time, rate in edits if media_time >= 0)


def _read(file: BinaryIO, range_: tuple[int, int]) -> bytes:
    file.seek(range_[0])
    return file.read(range_[1] - range_[0])


def _matroska_tracks(file: BinaryIO, size: int) -> Iterator[VideoHeader]:
    for segment, *segment_range in _elements(file, 0, size):
        if segment != _MATROSKA_SEGMENT:
            continue
        for kind, *tracks in _elements(file, segment_range[0], segment_range[1]):
            if kind != _MATROSKA_TRACKS:
                continue
            for entry, *entry_range in _elements(file, tracks[0], tracks[1]):
                for name, *video in _elements(file, entry_range[0], entry_range[1]) if entry == _MATROSKA_ENTRY else ():
                    if name == _MATROSKA_VIDEO:
                        fields = _elements(file, video[0], video[1])
                        crop = {
                            _MATROSKA_CROP[key]: (begin, end) for key, begin, end in fields if key in _MATROSKA_CROP
                        }
                        sides = {side: int.from_bytes(_read(file, where)) for side, where in crop.items()}
                        yield VideoHeader(sides=Crop(**sides))
            return


def _elements(file: BinaryIO, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """(identity, begin, end) of the contents of the EBML elements in a range."""
    while start < end:
        file.seek(start)
        identity, size = _number(file, keep_marker=True), _number(file, keep_marker=False)
        begin = file.tell()
        stop = end if size is None else min(begin + size, end)
        assert identity is not None, "an identity keeps its marker"
        yield identity, begin, stop
        start = stop


def _number(file: BinaryIO, *, keep_marker: bool) -> int | None:
    """An EBML number of 1 to 8 bytes; None where all its bits are ones: a size that was not known."""
    first = file.read(1)
    if not first or not first[0]:
        raise EOFError
    length = 9 - first[0].bit_length()
    data = first + file.read(length - 1)
    number = int.from_bytes(data)
    if keep_marker:
        return number
    number -= 1 << (7 * length)
    return None if number == (1 << (7 * length)) - 1 else number
