"""Chosen frames of files of many kinds, checked against what was written and against FFmpeg's plain decoding of all."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from qvgen.data.video_reader import SEEKABLE, VideoInfo, probe_video, read_frames, read_video
from tests.data.video_files import counting_frames, index_of, set_display_matrix, trim, write_clip, write_stream


@pytest.mark.parametrize(
    ("num_frames", "fps", "height", "width"), [(1, 8, 48, 64), (9, 25, 32, 96), (40, 23.976, 64, 48)]
)
def test_probe_of_written_clips(tmp_path: Path, num_frames: int, fps: float, height: int, width: int) -> None:
    info = probe_video(write_clip(tmp_path / "clip.mp4", num_frames, fps=fps, height=height, width=width))
    rate = Fraction(fps).limit_denominator(1001)
    assert (info.num_frames, info.fps, info.height, info.width) == (num_frames, rate, height, width)
    assert (info.codec, info.container in SEEKABLE) == ("h264", True)


@pytest.mark.parametrize(
    ("name", "codec"),
    [("a.mp4", "libx264"), ("a.mkv", "libx264"), ("a.avi", "mpeg4"), ("a.mpg", "mpeg2video"), ("a.webm", "libvpx-vp9"),
     ("a.mp4", "libsvtav1")],
)  # fmt: skip
def test_containers_and_codecs(tmp_path: Path, name: str, codec: str) -> None:
    fps = 25  # one that mpeg2 knows
    try:
        path = write_stream(tmp_path / name, counting_frames(30, height=64, width=64), codec=codec, fps=fps)
    except Exception as error:
        pytest.skip(f"this PyAV does not write {codec}: {error}")
    info, frames = read_frames(path, lambda info: range(2, info.num_frames, 9))
    assert (info.num_frames, info.height, info.width) == (30, 64, 64)
    assert abs(float(info.fps) - fps) < 0.25
    assert [index_of(frame) for frame in frames] == [2, 11, 20, 29]
    with av.open(str(path)) as container:
        whole = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    np.testing.assert_array_equal(frames, whole[2::9])
    assert info.treatment == ""  # what was made of such files before is found again


def test_animated_pictures(tmp_path: Path) -> None:
    pictures = [Image.fromarray(frame) for frame in counting_frames(12)]
    for name, options in (("a.gif", {}), ("a.webp", {"lossless": True})):
        pictures[0].save(tmp_path / name, save_all=True, append_images=pictures[1:], duration=100, **options)
        info, frames = read_frames(tmp_path / name, lambda info: [0, 5, 11])
        assert (info.num_frames, info.fps, info.height, info.width) == (12, 10, 48, 64)
        assert len(read_video(tmp_path / name)) == 12
        assert [index_of(frame) for frame in frames] == [0, 5, 11]


def test_frames_are_turned_upright(tmp_path: Path) -> None:
    frames = counting_frames(4)
    frames[:, :24, :32] = 255  # the left upper quarter
    path = write_stream(tmp_path / "phone.mp4", frames, codec="libx264")
    set_display_matrix(path, 0, 1, -1, 0)
    info, upright = read_frames(path, lambda info: [0, 3])
    assert (info.height, info.width) == (64, 48)
    assert upright.shape == (2, 64, 48, 3)
    assert upright[:, 4:28, 28:44].min() > 240  # now the right upper one


def test_frames_that_are_not_shown_do_not_count(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "trimmed.mp4", 32)
    trim(path, frames=20, fps=16)
    info, frames = read_frames(path, lambda info: range(info.num_frames))
    assert info.num_frames == len(frames)
    assert [index_of(frame) for frame in frames] == list(range(info.num_frames))
    assert 20 <= info.num_frames <= 22  # frames that others are coded from may stay


def test_a_cut_off_file_says_so(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (30, 64, 64, 3), dtype=np.uint8)
    path = write_stream(tmp_path / "cut.mp4", noise, codec="libx264", faststart=True)
    data = path.read_bytes()
    for share in (0.3, 0.9):
        path.write_bytes(data[: int(share * len(data))])
        with pytest.raises(ValueError, match=r"cut\.mp4 is cut off after \d+ of 30 frames"):
            probe_video(path)


def test_files_that_are_no_video_are_named(tmp_path: Path) -> None:
    whole = write_clip(tmp_path / "whole.mp4", 8).read_bytes()
    for content in (b"", b"a text " * 99, whole[: len(whole) // 2], b"RIFF\0\0\0\0WEBPVP8X"):
        (tmp_path / "bad.mp4").write_bytes(content)
        for call in (probe_video, lambda path: read_frames(path, lambda info: [0])):
            with pytest.raises(ValueError, match=r"bad\.mp4 (holds no frame|can't be decoded)"):
                call(tmp_path / "bad.mp4")
    with pytest.raises(FileNotFoundError, match=r"absent\.mp4"):
        probe_video(tmp_path / "absent.mp4")


def test_what_the_choice_raises_is_passed_on(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "clip.mp4", 8)

    def refuse(info: VideoInfo) -> list[int]:
        raise ValueError(f"{info.num_frames} are too few")

    with pytest.raises(ValueError, match="8 are too few"):
        read_frames(path, refuse)
