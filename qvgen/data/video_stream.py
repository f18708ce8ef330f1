"""The one stream of a container that is shown, the times of its frames and the shape of its pixels.

which stream    not a cover picture; the only one, or the only one that is marked as default; else the file is refused
which frames    those that are shown: not what an edit list cuts away, nor frames that only others are coded from
their times     presentation time stamps; else those of decoding (AVI); else the stated rate; a raw stream of MPEG-1
                    or -2 has a rate, any other is refused
pixel aspect    the container's, else the codec's; less than one pixel over the whole frame is the rounding of a size
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av
from av.container import InputContainer
from av.stream import Disposition
from av.video.stream import VideoStream

from qvgen.data.frame_format import FrameFormat

_NOT_THE_VIDEO = Disposition.attached_pic | Disposition.timed_thumbnails | Disposition.still_image
_DOLBY_VISION_ALONE = {"dvh1", "dvhe", "dva1", "dvav", "dav1"}
"""Names of streams that only a Dolby Vision display can show; compatible ones carry the codec's usual name."""

_CODECS_WITH_A_RATE = ("mpeg1video", "mpeg2video")


class PacketTimes(NamedTuple):
    """The part of a packet that counts; its bytes are not kept.

    Attributes:
        pts: When it is shown, in the stream's ticks, or None.
        dts: When it is decoded, or None.
        is_discarded: Whether an edit list cuts it away.
    """

    pts: int | None
    dts: int | None
    is_discarded: bool

    @classmethod
    def of(cls, packet: av.Packet) -> PacketTimes:
        """The times of a packet."""
        return cls(packet.pts, packet.dts, packet.is_discard)


def choose_stream(container: InputContainer, path: Path) -> int:
    """The number, among the video streams, of the one to show.

    Raises:
        ValueError: There is none, or it is not clear which.
    """
    streams = container.streams.video
    if not streams:
        raise ValueError(f"{path} holds no video stream")
    numbers = [number for number, stream in enumerate(streams) if not stream.disposition & _NOT_THE_VIDEO]
    if not numbers:
        raise ValueError(f"{path} holds no video but a cover picture")
    marked = [number for number in numbers if streams[number].disposition & Disposition.default]
    if len(numbers) > 1 and len(marked) != 1:
        raise ValueError(
            f"{path} holds {len(numbers)} video streams and marks {len(marked)} of them as the one to show; "
            "keep one (ffmpeg -i IN -map 0:v:0 -c copy OUT)"
        )
    return numbers[0] if len(numbers) == 1 else marked[0]


def refuse_stream(stream: VideoStream) -> str:
    """Why a stream can't be used whatever its frames are, as the end of a sentence; empty where it can."""
    if stream.codec_context.codec_tag in _DOLBY_VISION_ALONE:
        return "is Dolby Vision without a compatible picture; convert it to BT.709 first"
    if stream.metadata.get("alpha_mode", "0") != "0":
        return "has an alpha channel beside its frames; put it on a background first"
    return ""


def is_shown(packet: av.Packet) -> bool:
    """Whether a packet holds a frame to show: VP8 has packets that only others are coded from (RFC 6386, 9.1)."""
    if not packet.size:
        return False
    return packet.stream.codec_context.name != "vp8" or bool(bytes(packet)[0] >> 4 & 1)


def frame_times(
    packets: Sequence[PacketTimes], *, first: int | None, tick: Fraction, rate: Fraction | None
) -> tuple[list[Fraction], tuple[int, ...] | None]:
    """Seconds at which frames are shown, ascending, and their time stamps where all have one.

    Frames before the first that was decoded are not shown: what they are coded from is missing.

    Args:
        packets: Packets of the frames that are shown.
        first: Time stamp of the first frame that was decoded, or None.
        tick: Seconds of the stream's clock.
        rate: Frames per second that the file states, or None.

    Raises:
        ValueError: There are neither time stamps nor a rate.
    """
    stamps = [packet.pts for packet in packets if packet.pts is not None]
    if first is not None and len(stamps) == len(packets):
        shown = tuple(sorted(stamp for stamp in stamps if stamp >= first))
        return [stamp * tick for stamp in shown], shown
    decoding = sorted(packet.dts for packet in packets if packet.dts is not None)
    if len(decoding) == len(packets):  # AVI: one tick for each frame, in the order of decoding
        return [stamp * tick for stamp in decoding], None
    return counted_times(len(packets), rate=rate), None


def counted_times(count: int, *, rate: Fraction | None) -> list[Fraction]:
    """Seconds of evenly spaced frames; raises ValueError where no rate is known."""
    if rate is None and count > 1:
        raise ValueError("has no time stamps; put it into a container (ffmpeg -framerate RATE -i IN -c copy OUT.mp4)")
    return [index / (rate or Fraction(1)) for index in range(count)]


def raw_rate(stream: VideoStream) -> Fraction | None:
    """Frames per second of a raw stream, where its codec states them; FFmpeg's time stamps of such streams are guesses."""
    return stream.average_rate if stream.codec_context.name in _CODECS_WITH_A_RATE else None


def stored_aspect(stream: VideoStream) -> Fraction:
    """Width of a stored pixel by its height: the container's, else the codec's, else 1."""
    aspect = stream.sample_aspect_ratio or stream.codec_context.sample_aspect_ratio
    return Fraction(aspect) if aspect and aspect > 0 else Fraction(1)


def upright_aspect(aspect: Fraction, form: FrameFormat) -> Fraction:
    """Width of an upright pixel by its height; 1 where it stretches the whole frame by less than a pixel.

    854 x 480 pixels of a 16 : 9 picture have 1280 : 1281: the rounding of the size.
    """
    if abs(form.width * aspect - form.width) < 1 or abs(form.height / aspect - form.height) < 1:
        return Fraction(1)
    return 1 / aspect if form.turn[0] else aspect
