"""Video files: what is written is what is read, within what h264 with halved chroma may lose.

Checked against the frames themselves and the stream's own tags.
"""

from __future__ import annotations

import io
from pathlib import Path

import av
import numpy as np
import pytest

from qvgen.data.video import encode_video_bytes, side_by_side, upscale, viewable_scale, write_video
from qvgen.data.video_reader import read_video

COLORS = np.array(
    [
        [255, 0, 0],
        [0, 255, 0],
        [0, 0, 255],
        [255, 255, 0],
        [255, 0, 255],
        [0, 255, 255],
        [255, 255, 255],
        [0, 0, 0],
        [128, 128, 128],
        [200, 30, 90],
        [12, 200, 120],
        [255, 128, 0],
    ],
    dtype=np.uint8,
)


def psnr_db(a: np.ndarray, b: np.ndarray) -> float:
    return float(20 * np.log10(255) - 10 * np.log10(((a.astype(float) - b) ** 2).mean()))


def moving_square(num_frames: int = 6, size: int = 16) -> np.ndarray:
    frames = np.zeros((num_frames, size, size, 3), dtype=np.uint8)
    for f in range(num_frames):
        frames[f, 3:9, f : f + 6] = COLORS[f % 6]
    return frames


def natural(num_frames: int = 5, height: int = 96, width: int = 128) -> np.ndarray:
    """Smooth moving gradients, as photographs are."""
    f, y, x = np.meshgrid(np.arange(num_frames), np.arange(height), np.arange(width), indexing="ij")
    phases = (x / 40 + f / 5, y / 35 - f / 7, (x + y) / 50)
    return np.stack([np.rint(127.5 + 110 * np.sin(phase)) for phase in phases], axis=-1).astype(np.uint8)


def test_round_trip_of_a_tiny_video(tmp_path: Path) -> None:
    frames = moving_square()
    path = write_video(tmp_path / "deep" / "square.mp4", frames, fps=8)
    read = read_video(path)
    assert read.shape == (6, 256, 256, 3)
    assert read.dtype == np.uint8
    # Halved chroma blurs each saturated edge over a pixel or two of every 16.
    assert psnr_db(read, upscale(frames, scale=16)) > 30
    # The middles of the blocks are untouched by that: the original comes back by picking them.
    picked = read[:, 8::16, 8::16].astype(int)
    assert np.abs(picked - frames).max() <= 4


def test_round_trip_of_a_smooth_video(tmp_path: Path) -> None:
    frames = natural()
    read = read_video(write_video(tmp_path / "smooth.mp4", frames, fps=16, scale=1))
    assert read.shape == frames.shape
    assert psnr_db(read, frames) > 40


def test_colours_are_faithful(tmp_path: Path) -> None:
    frames = np.broadcast_to(COLORS.reshape(1, 3, 4, 3), (4, 3, 4, 3)).copy()
    read = read_video(write_video(tmp_path / "colors.mp4", frames, fps=8, scale=64))
    centres = read[:, 32::64, 32::64].astype(int)
    assert np.abs(centres - frames).max() <= 4  # BT.601 read as BT.709 would be off by 10 to 24


def test_the_stream_plays_everywhere_and_says_its_colours() -> None:
    with av.open(io.BytesIO(encode_video_bytes(moving_square(), fps=12.5))) as container:
        stream = container.streams.video[0]
        context = stream.codec_context
        assert (context.name, context.pix_fmt) == ("h264", "yuv420p")
        assert (context.color_range, context.colorspace) == (1, 1)  # limited range, BT.709
        assert (context.color_primaries, context.color_trc) == (1, 1)
        assert float(stream.average_rate) == 12.5
        assert stream.frames == 6


@pytest.mark.parametrize(("height", "width"), [(15, 17), (1, 1), (16, 9)])
def test_odd_sizes_repeat_the_last_row_and_column(tmp_path: Path, height: int, width: int) -> None:
    frames = np.full((3, height, width, 3), 90, dtype=np.uint8)
    read = read_video(write_video(tmp_path / "odd.mp4", frames, fps=8, scale=3))
    expected = (3, 3 * height + 3 * height % 2, 3 * width + 3 * width % 2, 3)
    assert read.shape == expected
    assert np.abs(read.astype(int) - 90).max() <= 2  # the repeated edge has the frame's colour, not black


def test_one_frame_and_many_give_that_many(tmp_path: Path) -> None:
    for num_frames in (1, 2, 33):
        path = write_video(tmp_path / f"{num_frames}.mp4", moving_square(num_frames, size=64), fps=8, scale=1)
        assert len(read_video(path)) == num_frames


def test_bytes_depend_on_the_frames_alone() -> None:
    frames = moving_square()
    again = encode_video_bytes(np.asfortranarray(frames), fps=8)
    assert encode_video_bytes(frames, fps=8) == again
    assert encode_video_bytes(frames[::-1], fps=8) != again
    assert len(encode_video_bytes(natural(), fps=8, scale=1, crf=30)) < len(
        encode_video_bytes(natural(), fps=8, scale=1)
    )


@pytest.mark.parametrize(
    "frames",
    [
        np.zeros((2, 16, 16, 3), dtype=np.float32),
        np.zeros((16, 16, 3), dtype=np.uint8),
        np.zeros((2, 3, 16, 16), dtype=np.uint8),
        np.zeros((0, 16, 16, 3), dtype=np.uint8),
    ],
)
def test_bad_frames_leave_the_old_file(tmp_path: Path, frames: np.ndarray) -> None:
    path = tmp_path / "video.mp4"
    path.write_bytes(b"old")
    with pytest.raises(ValueError, match=r"not uint8 \[frames, height, width, 3\]"):
        write_video(path, frames, fps=8)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_bad_settings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="fps=0"):
        write_video(tmp_path / "video.mp4", moving_square(), fps=0)
    with pytest.raises(ValueError, match="scale=0"):
        write_video(tmp_path / "video.mp4", moving_square(), fps=8, scale=0)
    with pytest.raises(ValueError, match=r"video\.avi does not end in \.mp4"):
        write_video(tmp_path / "video.avi", moving_square(), fps=8)
    assert not list(tmp_path.iterdir())


def test_upscale_repeats_pixels() -> None:
    frames = natural(2, 3, 5)
    large = upscale(frames, scale=4)
    assert large.shape == (2, 12, 20, 3)
    for dy, dx in ((0, 0), (3, 3), (1, 2)):
        np.testing.assert_array_equal(large[:, dy::4, dx::4], frames)
    assert [viewable_scale(height) for height in (1, 16, 255, 256, 720)] == [256, 16, 2, 1, 1]


def test_side_by_side_keeps_the_pixels_under_labels() -> None:
    first, second = moving_square(), moving_square()[::-1]
    joined = side_by_side(
        [first, second], ["teacher", "a label that is much too long for its tile of 32 pixels"], scale=2
    )
    assert joined.shape == (6, 32 + 32, 2 * 32 + 8, 3)
    np.testing.assert_array_equal(joined[:, 32:, :32], upscale(first, scale=2))
    np.testing.assert_array_equal(joined[:, 32:, 40:], upscale(second, scale=2))
    assert joined[0, :32, :32].max() > 200  # a label is there
    assert (joined[:, :32] == joined[:1, :32]).all()  # and stands still
    assert joined[0, :32, 32:40].max() == 27  # no label runs into the gap
    with pytest.raises(ValueError, match="one label for each"):
        side_by_side([first, second], ["teacher"])
    with pytest.raises(ValueError, match="all of one shape"):
        side_by_side([first, second[:2]], ["a", "b"])
    with pytest.raises(ValueError, match="at least one video"):
        side_by_side([], [])
