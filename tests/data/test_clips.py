"""Buckets, frames and boxes: against their definitions, for any clip; real files of several sizes and rates.

No distortion: the box has the bucket's aspect ratio within one pixel. Frames: round(j * clip fps / model fps), centred.
"""

from __future__ import annotations

import csv
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qvgen.data.clip_report import report_bad
from qvgen.data.clips import (
    MAX_ENLARGEMENT,
    BadClip,
    Bucket,
    CutSettings,
    choose_cut,
    crop_box,
    cut_clip,
    frame_indices,
    resize_frames,
    to_pixels,
)
from qvgen.data.video_reader import VideoInfo
from tests.data.video_files import index_of, write_clip


def info_of(num_frames: int = 200, fps: float | str = 24, height: int = 720, width: int = 1280) -> VideoInfo:
    return VideoInfo(
        num_frames=num_frames, fps=Fraction(fps), height=height, width=width, codec="h264", container="mp4"
    )


def buckets_of(*labels: str) -> tuple[Bucket, ...]:
    return tuple(Bucket.parse(label) for label in labels)


side = st.integers(16, 4000)
rate = st.sampled_from(["8", "10", "12", "15", "24000/1001", "24", "25", "30000/1001", "30", "50", "60000/1001", "60"])


@given(num_frames=st.integers(1, 500), fps=rate, frames=st.integers(1, 121), model_fps=st.sampled_from([8, 12, 16, 24]))
def test_frames_are_at_the_models_rate_and_never_twice(num_frames: int, fps: str, frames: int, model_fps: int) -> None:
    info = info_of(num_frames, fps)
    if num_frames < frames:
        assert frame_indices(info, frames=frames, fps=model_fps) is None
        return
    if info.fps < Fraction(9, 10) * model_fps:
        with pytest.raises(BadClip, match=f"the model needs {model_fps}"):
            frame_indices(info, frames=frames, fps=model_fps)
        return
    indices = frame_indices(info, frames=frames, fps=model_fps)
    stride = max(Fraction(1), info.fps / model_fps)
    needed = round(float(stride * (frames - 1)) + 1e-9) + 1
    if indices is None:
        assert num_frames < needed + 1
        return
    assert len(indices) == frames
    assert 0 <= indices[0] <= indices[-1] < num_frames
    assert list(indices) == sorted(set(indices))
    for j, index in enumerate(indices):  # within half a frame of the right moment
        assert abs(index - indices[0] - j * stride) <= Fraction(1, 2)
    before, after = indices[0], num_frames - 1 - indices[-1]
    assert after - before in (0, 1)


def test_frames_of_known_clips() -> None:
    assert frame_indices(info_of(10, 24), frames=4, fps=8) == (0, 3, 6, 9)
    assert frame_indices(info_of(9, 24), frames=4, fps=8) is None
    assert frame_indices(info_of(13, 24), frames=4, fps=8) == (1, 4, 7, 10)
    assert frame_indices(info_of(8, 25), frames=5, fps=16) == (0, 2, 3, 5, 6)  # 0, 1.5625, 3.125, 4.6875, 6.25
    assert frame_indices(info_of(4, 15), frames=4, fps=16) == (0, 1, 2, 3)


@given(height=side, width=side, out_height=side, out_width=side)
def test_the_box_is_the_largest_that_is_not_distorted(height: int, width: int, out_height: int, out_width: int) -> None:
    left, top, right, bottom = crop_box(info_of(height=height, width=width), height=out_height, width=out_width)
    assert 0 <= left <= right <= width
    assert 0 <= top <= bottom <= height
    box_width, box_height = right - left, bottom - top
    assert abs(box_width * out_height / out_width - box_height) < 1e-6 * height
    assert np.isclose(box_width, width) or np.isclose(box_height, height)
    assert np.isclose(left, width - right)
    assert np.isclose(top, height - bottom)


@given(height=side, width=side, num_frames=st.integers(1, 200))
def test_the_bucket_is_the_nearest_that_the_clip_can_fill(height: int, width: int, num_frames: int) -> None:
    buckets = buckets_of("49x480x720", "49x720x480", "17x480x720", "17x480x480")
    info = info_of(num_frames, 8, height, width)

    def fits(bucket: Bucket) -> bool:
        return (
            bucket.frames <= num_frames
            and bucket.height <= MAX_ENLARGEMENT * height
            and bucket.width <= MAX_ENLARGEMENT * width
        )

    def stretch(bucket: Bucket) -> float:
        return abs(float(np.log(bucket.width * height / (bucket.height * width))))

    settings = CutSettings(fps=8, buckets=buckets)
    possible = [bucket for bucket in buckets if fits(bucket)]
    if not possible:
        with pytest.raises(BadClip, match=f"{num_frames} frames|{width} x {height} pixels"):
            choose_cut(info, settings=settings)
        return
    cut = choose_cut(info, settings=settings)
    assert cut.bucket in possible
    assert cut.bucket.frames == len(cut.indices)
    assert cut.bucket.frames == max(bucket.frames for bucket in possible)
    same_length = [bucket for bucket in possible if bucket.frames == cut.bucket.frames]
    assert stretch(cut.bucket) <= min(map(stretch, same_length)) + 1e-9


def test_buckets_of_one_aspect_ratio_are_chosen_by_sharpness() -> None:
    settings = CutSettings(fps=8, buckets=buckets_of("9x240x360", "9x480x720", "9x960x1440"))
    chosen = {
        height: choose_cut(info_of(height=height, width=height * 3 // 2), settings=settings).bucket.height
        for height in (200, 240, 479, 480, 1000)
    }
    assert chosen == {200: 240, 240: 240, 479: 240, 480: 480, 1000: 960}


@pytest.mark.parametrize(
    ("info", "reason"),
    [
        (info_of(num_frames=10), "10 frames at 24 per second are too short for 17 at 8"),
        (info_of(num_frames=1, fps=1), "1 frames at 1 per second are too short for 17 at 8"),
        (info_of(fps=5), "5 frames per second; the model needs 8"),
        (info_of(height=144, width=176), "176 x 144 pixels are too small for 480 x 480"),
    ],
)
def test_clips_that_do_not_fit_say_why(info: VideoInfo, reason: str) -> None:
    with pytest.raises(BadClip, match=reason):
        choose_cut(info, settings=CutSettings(fps=8, buckets=buckets_of("17x480x720", "17x480x480")))


def test_a_circle_stays_a_circle() -> None:
    y, x = np.mgrid[:300, :500]
    disc = ((y - 150) ** 2 + (x - 250) ** 2 < 100**2).astype(np.uint8) * 255
    frames = np.broadcast_to(disc[None, :, :, None], (2, 300, 500, 3))
    info = info_of(num_frames=2, height=300, width=500)
    for label in ("2x96x96", "2x90x150", "2x128x64", "2x330x550"):
        cut = choose_cut(info, settings=CutSettings(fps=24, buckets=buckets_of(label)))
        resized = resize_frames(frames, cut=cut)
        assert resized.shape[1:3] == (cut.bucket.height, cut.bucket.width)
        ink = resized[0, :, :, 0] > 127
        high, wide = int(ink.any(axis=1).sum()), int(ink.any(axis=0).sum())
        factor = cut.bucket.height / (cut.box[3] - cut.box[1])
        assert abs(wide - min(199 * factor, cut.bucket.width)) <= 1
        assert abs(high - 199 * factor) <= 1


def test_a_frame_of_the_right_size_is_left_alone() -> None:
    frames = np.random.default_rng(0).integers(0, 256, (3, 48, 64, 3), dtype=np.uint8)
    cut = choose_cut(info_of(3, 8, 48, 64), settings=CutSettings(fps=8, buckets=buckets_of("3x48x64")))
    assert resize_frames(frames, cut=cut) is frames


@pytest.mark.parametrize(
    ("num_frames", "fps", "height", "width", "label"),
    [
        (40, 16, 48, 64, "9x32x48"),
        (41, 24, 64, 48, "9x48x32"),
        (40, 8, 48, 48, "9x32x48"),
        (14, 16, 96, 128, "5x32x48"),
    ],
)
def test_cut_of_real_files(tmp_path: Path, num_frames: int, fps: float, height: int, width: int, label: str) -> None:
    settings = CutSettings(fps=8, buckets=buckets_of("9x32x48", "9x48x32", "5x32x48"))
    path = write_clip(tmp_path / "clip.mp4", num_frames, fps=fps, height=height, width=width)
    cut, frames = cut_clip(path, settings=settings)
    assert cut.bucket.label == label
    assert frames.shape == (cut.bucket.frames, cut.bucket.height, cut.bucket.width, 3)
    assert tuple(index_of(frame) for frame in frames) == cut.indices
    again, same = cut_clip(path, settings=settings)
    assert again == cut
    np.testing.assert_array_equal(same, frames)


def test_pixels_are_in_minus_one_to_one() -> None:
    frames = np.array([0, 51, 255], dtype=np.uint8).reshape(1, 1, 1, 3)
    pixels = to_pixels(frames)
    assert pixels.shape == (3, 1, 1, 1)
    torch.testing.assert_close(pixels.flatten(), torch.tensor([-1, -0.6, 1]))
    assert (float(pixels[0]), float(pixels[2])) == (-1.0, 1.0)


def test_bad_clips_are_reported_and_too_many_fail(tmp_path: Path) -> None:
    report = tmp_path / "deep" / "bad.csv"
    bad = [("b, with comma.mp4", "short"), ("a.mp4", "broken")]
    report_bad(bad, total=40, max_bad=0.05, report=report)
    with report.open(newline="") as file:
        assert list(csv.reader(file)) == [["file_name", "reason"], ["a.mp4", "broken"], ["b, with comma.mp4", "short"]]
    with pytest.raises(
        ValueError, match=r"2 of 39 clips .* more than max_bad=0.05; see .*bad.csv \(first: a.mp4: broken"
    ):
        report_bad(bad, total=39, max_bad=0.05, report=report)
    with pytest.raises(ValueError, match="2 of 2 clips"):
        report_bad(bad, total=2, max_bad=1.0, report=report)
    report_bad([], total=2, max_bad=0.0, report=report)
    assert report.read_text() == "file_name,reason\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"fps": 0, "buckets": buckets_of("1x8x8")}, "fps=0"),
        ({"fps": float("nan"), "buckets": buckets_of("1x8x8")}, "fps=nan"),
        ({"fps": 8, "buckets": ()}, r"buckets=\[\]"),
        ({"fps": 8, "buckets": buckets_of("1x8x8", "1x8x8")}, "1x8x8, 1x8x8.* different"),
    ],
)
def test_bad_settings_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CutSettings(**arguments)


@pytest.mark.parametrize("text", ["49x480", "49x480x-7", "49 x 480 x 720", "", "0x8x8", "axbxc"])
def test_bad_buckets_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"bucket .*49x480x720"):
        Bucket.parse(text)
