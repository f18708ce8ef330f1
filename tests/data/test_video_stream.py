"""Which stream of a file is shown, and the shape of its pixels; against what was written."""

from __future__ import annotations

import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.stream import Disposition

from qvgen.data.clips import Bucket, CutSettings, choose_cut, cut_clip
from qvgen.data.video import Frames
from qvgen.data.video_reader import VideoInfo, probe_video, read_frames, read_video
from tests.data.video_files import counting_frames, index_of, insert_box, set_display_matrix, write_clip, write_stream


def disc(*, height: int, width: int, aspect: Fraction, num_frames: int = 4) -> Frames:
    """A white disc that is round where a pixel is ``aspect`` times as wide as high."""
    y, x = np.mgrid[:height, :width]
    inside = (y - height / 2 + 0.5) ** 2 + ((x - width / 2 + 0.5) * float(aspect)) ** 2 < (0.4 * height) ** 2
    return np.broadcast_to((255 * inside).astype(np.uint8)[None, ..., None], (num_frames, height, width, 3)).copy()


def roundness(frame: np.ndarray) -> float:
    """Width by height of what is white."""
    ink = frame[..., 0] > 127
    return float(ink.any(axis=0).sum() / ink.any(axis=1).sum())


@pytest.mark.parametrize("aspect", [Fraction(2), Fraction(1, 2), Fraction(16, 11), Fraction(10, 11)])
@pytest.mark.parametrize("label", ["4x48x96", "4x64x64", "4x96x48"])
def test_a_disc_stays_round_whatever_the_pixels_aspect(tmp_path: Path, aspect: Fraction, label: str) -> None:
    frames = disc(height=128, width=2 * round(64 / aspect), aspect=aspect)
    path = write_stream(tmp_path / "a.mp4", frames, codec="libx264", sample_aspect_ratio=aspect)
    assert probe_video(path).pixel_aspect == aspect
    chosen, cut = cut_clip(path, settings=CutSettings(fps=16, buckets=(Bucket.parse(label),)))
    left, top, right, bottom = chosen.box
    assert (right - left) * aspect / (bottom - top) == pytest.approx(chosen.bucket.width / chosen.bucket.height)
    if chosen.bucket.width == chosen.bucket.height:  # else a part of the disc is cut off
        assert roundness(cut[0]) == pytest.approx(1, abs=0.08)


def test_the_container_says_the_aspect_too_and_a_turn_inverts_it(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.mp4", 4)
    insert_box(path, struct.pack(">2I", 2, 1), kind=b"pasp")
    assert probe_video(path).pixel_aspect == 2
    set_display_matrix(path, 0, 1, -1, 0)
    info = probe_video(path)
    assert (info.height, info.width, info.pixel_aspect) == (64, 48, Fraction(1, 2))


def test_the_rounding_of_a_size_is_no_aspect(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.mp4", 2, height=480, width=854)
    insert_box(path, struct.pack(">2I", 1280, 1281), kind=b"pasp")
    assert probe_video(path).pixel_aspect == 1


def test_wide_pixels_choose_the_bucket_and_count_for_the_enlargement() -> None:
    settings = CutSettings(fps=8, buckets=(Bucket.parse("4x64x64"), Bucket.parse("4x64x128")))
    info = VideoInfo(
        num_frames=9, fps=Fraction(8), height=64, width=64, codec="", container="", pixel_aspect=Fraction(2)
    )
    assert choose_cut(info, settings=settings).bucket.width == 128
    assert choose_cut(info, settings=settings).box == (0.0, 0.0, 64.0, 64.0)
    with pytest.raises(ValueError, match="are too small for"):  # 40 x 64 times 3.2 stored pixels, though 128 high
        choose_cut(
            VideoInfo(
                num_frames=9, fps=Fraction(8), height=128, width=40, codec="", container="", pixel_aspect=Fraction(4)
            ),
            settings=CutSettings(fps=8, buckets=(Bucket.parse("4x128x160"), Bucket.parse("4x128x168"))),
        )


def edged(*, height: int, width: int) -> Frames:
    """Frames that differ at every place."""
    frames = counting_frames(2, height=height, width=width)
    frames[:, :8], frames[:, :, :8], frames[:, -6:, :20] = 255, 255, 0
    return frames


def test_cropping_is_applied(tmp_path: Path) -> None:
    """By the codec (50 rows of 64 that are coded) and by the container: clean aperture of mp4, before it is turned."""
    path = write_stream(tmp_path / "a.mp4", edged(height=50, width=70), codec="libx264")
    stored = read_video(path)
    assert stored.shape == (2, 50, 70, 3)
    # 54 x 34 pixels of 70 x 50, the centre moved by (1, -1/2): columns 9 to 62, rows 7.5 to 41.5, of which 8 to 40 are whole
    insert_box(path, struct.pack(">8i", 54, 1, 34, 1, 1, 1, -1, 2), kind=b"clap")
    info, found = read_frames(path, lambda info: [0, 1])
    assert (info.height, info.width) == (33, 54)
    np.testing.assert_array_equal(found, stored[:, 8:41, 9:63])
    assert info.treatment == "Crop(left=9, top=8, right=7, bottom=9)"
    set_display_matrix(path, 0, 1, -1, 0)
    info, turned = read_frames(path, lambda info: [0, 1])
    assert (info.height, info.width) == (54, 33)
    np.testing.assert_array_equal(turned, np.rot90(found, k=-1, axes=(1, 2)))


def test_cropping_by_matroska_is_applied(tmp_path: Path) -> None:
    """Its elements are written in place of those of the colours, so that no place in the file changes."""
    tags = {"colorspace": 1, "color_primaries": 1, "color_trc": 1, "color_range": 1}
    path = write_stream(tmp_path / "a.mkv", edged(height=48, width=64), codec="libx264", **tags)
    stored = read_video(path)
    data = bytearray(path.read_bytes())
    colours = data.index(b"\x55\xb0")
    size = 3 + (data[colours + 2] & 0x7F)
    sides = {b"\x54\xcc": 3, b"\x54\xbb": 4, b"\x54\xdd": 6}  # left, top, right
    crops = (
        b"".join(key + bytes([0x81, value]) for key, value in sides.items()) + b"\x54\xaa\x82\0\2"
    )  # bottom, two bytes
    padding = size - len(crops) - 2
    data[colours : colours + size] = crops + bytes([0xEC, 0x80 + padding]) + bytes(padding)
    path.write_bytes(data)
    info, found = read_frames(path, lambda info: [0, 1])
    assert (info.height, info.width) == (42, 55)
    np.testing.assert_array_equal(found, stored[:, 4:46, 3:58])


def test_an_edit_that_changes_the_speed_is_refused(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.mp4", 8)
    data = bytearray(path.read_bytes())
    rate = data.find(b"elst") + 20
    assert data[rate : rate + 4] == b"\0\1\0\0"
    data[rate : rate + 4] = b"\0\2\0\0"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"has an edit list that changes the speed \(2\)"):
        probe_video(path)


def write_streams(path: Path, parts: list[Frames], *, marks: list[int], codecs: list[str] | None = None) -> Path:
    """Several video streams in one file, with their dispositions."""
    with av.open(str(path), "w") as container:
        streams = []
        for frames, mark, codec in zip(parts, marks, codecs or ["libx264"] * len(parts), strict=True):
            stream = container.add_stream(codec, rate=16)
            stream.height, stream.width = frames.shape[1:3]
            stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
            stream.disposition = mark
            streams.append(stream)
        for stream, frames in zip(streams, parts, strict=True):
            for frame in frames:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode(None))
    return path


def test_the_stream_that_is_marked_as_default_is_shown(tmp_path: Path) -> None:
    frames = counting_frames(20)
    parts = [frames[10:], frames[:10]]
    for marks, first in (([0, 1], 0), ([1, 0], 10)):
        path = write_streams(tmp_path / f"{first}.mkv", parts, marks=marks)
        assert [index_of(frame) for frame in read_video(path)] == list(range(first, first + 10))
    for marks in ([1, 1], [0, 0]):
        path = write_streams(tmp_path / "both.mkv", parts, marks=marks)
        with pytest.raises(
            ValueError, match=rf"holds 2 video streams and marks {sum(marks)} of them as the one to show"
        ):
            probe_video(path)


def test_a_cover_picture_is_no_video(tmp_path: Path) -> None:
    cover = int(Disposition.attached_pic)
    frames = counting_frames(10)
    path = write_streams(tmp_path / "a.mp4", [frames[:1], frames[1:]], marks=[cover, 1], codecs=["mjpeg", "libx264"])
    with av.open(str(path)) as container:
        assert sum(bool(stream.disposition & cover) for stream in container.streams.video) == 1
    assert [index_of(frame) for frame in read_video(path)] == list(range(1, 10))


def test_files_without_a_video_stream_say_so(tmp_path: Path) -> None:
    path = tmp_path / "sound.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        samples = np.zeros((1, 16000), dtype=np.float32)
        sound = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
        sound.sample_rate = 16000
        container.mux(stream.encode(sound))
        container.mux(stream.encode(None))
    with pytest.raises(ValueError, match=r"sound\.mp4 holds no video stream"):
        probe_video(path)
