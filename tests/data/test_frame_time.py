"""Frames at their true times: of files whose time stamps are uneven, late, negative, doubled or missing."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qvgen.data.clips import BadClip, Bucket, CutSettings, UnevenClip, choose_cut, cut_clip
from qvgen.data.frame_time import nearest_frames, read_timing
from qvgen.data.video_reader import VideoInfo, probe_video, read_frames, read_video
from tests.data.video_files import counting_frames, index_of, write_clip, write_planes, write_stream

MILLISECOND = Fraction(1, 1000)


def milliseconds(*times: int) -> list[Fraction]:
    return [Fraction(time, 1000) for time in times]


def cut(frames: int, fps: float = 8) -> CutSettings:
    return CutSettings(fps=fps, buckets=(Bucket(frames=frames, height=48, width=64),))


def write_timed(path: Path, times_ms: Sequence[int]) -> Path:
    """Frames that say which they are, at these times, in mkv."""
    frames = [[np.pad(frame, ((0, 0), (0, 0), (0, 1)))[..., [2, 1, 0, 3]]] for frame in counting_frames(len(times_ms))]
    return write_planes(path, frames, pixels="bgr0", times_ms=times_ms)


def restamp(source: Path, target: Path, stamps_ms: Sequence[int]) -> Path:
    """The packets of a file at other times, in another container."""
    with av.open(str(source)) as given, av.open(str(target), "w") as container:
        stream = container.add_stream_from_template(given.streams.video[0])
        packets = [packet for packet in given.demux(given.streams.video[0]) if packet.size]
        for index, (packet, stamp) in enumerate(zip(packets, stamps_ms, strict=True)):
            packet.pts = round(stamp / 1000 / packet.time_base)
            packet.dts = min(packet.pts, round(min(stamps_ms[index:]) / 1000 / packet.time_base))
            packet.stream = stream
            container.mux(packet)
    return target


@given(
    count=st.integers(2, 60),
    fps=st.sampled_from([8, 24, 25, 30, 50, 60]),
    offset=st.integers(-9000, 9000),
)
def test_even_times_keep_the_stated_rate(count: int, fps: int, offset: int) -> None:
    """With the rounding of a clock of milliseconds and a start at any time."""
    times = [MILLISECOND * round(1000 * index / fps + offset) for index in range(count)]
    timing = read_timing(times, tick=MILLISECOND, stated=Fraction(fps))
    assert (timing.fps, timing.times_s) == (fps, None)


def test_a_stated_rate_that_the_times_deny() -> None:
    times = [Fraction(index, 24) for index in range(100)]
    assert read_timing(times, tick=MILLISECOND, stated=Fraction(30)).fps == 24
    assert read_timing(times, tick=MILLISECOND, stated=None).fps == 24
    assert read_timing(times[:1], tick=MILLISECOND, stated=None).fps == 1
    with pytest.raises(ValueError, match="has the same time stamp on all of its 3 frames"):
        read_timing(times[:1] * 3, tick=MILLISECOND, stated=Fraction(24))


@pytest.mark.parametrize("tick", [Fraction(1, 16), Fraction(1, 12800)])
@given(count=st.integers(4, 200), data=st.data())
def test_one_lost_frame_is_seen_on_any_clock(tick: Fraction, count: int, data: st.DataObject) -> None:
    lost = data.draw(st.integers(1, count - 2))
    times = [Fraction(index, 16) for index in range(count) if index != lost]
    timing = read_timing(times, tick=tick, stated=Fraction(16))
    assert timing.times_s == tuple(float(time) for time in times)


def test_uneven_times_are_told() -> None:
    timing = read_timing(milliseconds(500, 600, 800, 900), tick=MILLISECOND, stated=Fraction(10))
    assert timing.times_s == (0.0, 0.1, 0.3, 0.4)
    assert float(timing.fps) == 7.5


@given(
    gaps=st.lists(st.integers(1, 120), min_size=1, max_size=60),
    count=st.integers(1, 30),
    step_ms=st.sampled_from([40, 60, 125]),
)
def test_frames_nearest_to_the_models_moments(gaps: list[int], count: int, step_ms: int) -> None:
    times = list(np.cumsum([0, *gaps]) / 1000)
    step_s = step_ms / 1000
    spare = times[-1] - (count - 1) * step_s
    try:
        chosen = nearest_frames(times, count=count, step_s=step_s)
    except ValueError:  # it has no frame for one of the moments, which a clip of smaller gaps always has
        assert spare >= 0
        assert max(gaps) > step_ms / 2
        return
    if chosen is None:
        assert spare < 0
        return
    assert list(chosen) == sorted(set(chosen))
    for j, index in enumerate(chosen):
        moment = spare / 2 + j * step_s
        assert abs(times[index] - moment) <= min(min(abs(time - moment) for time in times) + 1e-9, step_s / 2 + 1e-9)


def test_a_variable_rate_is_followed(tmp_path: Path) -> None:
    """50 frames per second for a second, then 12.5 for two: the average, 25, would take frames 0.4 s too early."""
    times = [20 * index for index in range(50)] + [1000 + 80 * index for index in range(26)]
    path = write_timed(tmp_path / "a.mkv", times)
    chosen, frames = cut_clip(path, settings=cut(23))
    moments = (3.0 - 22 / 8) / 2 + np.arange(23) / 8
    taken = [index_of(frame) for frame in frames]
    assert taken == list(chosen.indices)
    assert np.abs(np.array(times)[taken] / 1000 - moments).max() <= 0.041
    assert (chosen.used_s, chosen.clip_s) == (pytest.approx(22 / 8, abs=0.04), 3.0)


def test_a_clip_that_stands_still_is_refused_with_the_place(tmp_path: Path) -> None:
    times = [40 * index for index in range(20)] + [1760 + 40 * index for index in range(20)]
    path = write_timed(tmp_path / "a.mkv", times)
    with pytest.raises(
        BadClip, match=r"no frame of its own at 0.885 s, between the frames at 0.760 and 1.760 s; .* every 0.125 s"
    ):
        cut_clip(path, settings=cut(17))


def test_a_shorter_bucket_may_lie_beside_the_gap() -> None:
    times = (0.0, *(1 + 0.1 * index for index in range(20)))
    info = VideoInfo(num_frames=21, fps=Fraction(20, 3), height=48, width=64, codec="", container="", times_s=times)
    buckets = (Bucket(frames=17, height=48, width=64), Bucket(frames=5, height=48, width=64))
    assert choose_cut(info, settings=CutSettings(fps=6, buckets=buckets)).bucket.frames == 5
    with pytest.raises(UnevenClip):
        choose_cut(info, settings=CutSettings(fps=6, buckets=buckets[:1]))


def test_a_start_offset_and_frames_out_of_order_change_nothing(tmp_path: Path) -> None:
    """Start at 5 s, at 1.4 s (mpegts), and before 0 (B-frames in mp4, whose time of decoding is negative)."""
    paths = [write_timed(tmp_path / "late.mkv", [5000 + 40 * index for index in range(30)])]
    for name in ("a.ts", "a.mp4", "b.mkv", "a.mov"):
        options = {"bf": "3", "x264-params": "b-adapt=0:keyint=10"}
        paths.append(write_stream(tmp_path / name, counting_frames(30), codec="libx264", fps=25, options=options))
    for path in paths:
        info, frames = read_frames(path, lambda info: [0, 7, 13, 29])
        assert (info.num_frames, info.times_s, info.fps) == (30, None, 25)
        assert [index_of(frame) for frame in frames] == [0, 7, 13, 29]


def test_an_edit_list_that_begins_between_key_frames(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.mp4", 32)
    whole = read_video(path)
    data = bytearray(path.read_bytes())
    entry = data.find(b"elst") + 12  # duration, media time
    ticks = probe_ticks(path)
    begin = struct.unpack_from(">i", data, entry + 4)[0] + round(11 / 16 / ticks)
    struct.pack_into(">i", data, entry + 4, begin)
    path.write_bytes(data)
    info, frames = read_frames(path, lambda info: range(info.num_frames))
    assert info.num_frames == 21
    np.testing.assert_array_equal(frames, whole[11:])


def probe_ticks(path: Path) -> Fraction:
    with av.open(str(path)) as container:
        time_base = container.streams.video[0].time_base
        assert time_base is not None
        return time_base


def test_time_stamps_that_are_no_times_are_refused(tmp_path: Path) -> None:
    """Two frames at one time; none at all, as in a raw stream; and the same stamps for all."""
    source = write_timed(tmp_path / "source.mkv", [40 * index for index in range(10)])
    doubled = restamp(source, tmp_path / "doubled.mkv", [0, 40, 80, 120, 120, 200, 240, 280, 320, 360])
    assert [index_of(frame) for frame in read_frames(doubled, lambda info: [0, 2, 5])[1]] == [0, 2, 5]
    with pytest.raises(ValueError, match=r"doubled\.mkv has several frames with one time stamp"):
        read_frames(doubled, lambda info: [0, 3])
    stated = write_stream(tmp_path / "raw.m1v", counting_frames(30), codec="mpeg1video", fps=25)  # by its own header
    info, frames = read_frames(stated, lambda info: [0, 8, 29])
    assert (info.fps, info.times_s, [index_of(frame) for frame in frames]) == (25, None, [0, 8, 29])
    raw = write_stream(tmp_path / "raw.h264", counting_frames(10), codec="libx264")
    with pytest.raises(ValueError, match=r"raw\.h264 has no time stamps; put it into a container"):
        probe_video(raw)
    frozen = restamp(source, tmp_path / "frozen.mkv", [40] * 10)
    with pytest.raises(ValueError, match="has the same time stamp on all of its 10 frames"):
        probe_video(frozen)


def test_stamps_out_of_order_are_put_in_order_or_refused(tmp_path: Path) -> None:
    """Intra-coded frames whose packets come in another order: each is found by its own time."""
    source = write_timed(tmp_path / "source.mkv", [40 * index for index in range(10)])
    order = [0, 1, 3, 2, 4, 5, 7, 6, 8, 9]
    path = restamp(source, tmp_path / "a.mkv", [40 * place for place in order])
    frames = read_frames(path, lambda info: range(10))[1]
    assert [index_of(frame) for frame in frames] == order


def test_frames_that_are_never_shown_are_not_counted(tmp_path: Path) -> None:
    """VP8's alternate references are packets of their own: here packet 5, by its bit show_frame."""
    source = write_stream(tmp_path / "source.webm", counting_frames(12), codec="libvpx")
    with av.open(str(source)) as given, av.open(str(tmp_path / "a.webm"), "w") as container:
        stream = container.add_stream_from_template(given.streams.video[0])
        for index, packet in enumerate(packet for packet in given.demux(video=0) if packet.size):
            data = bytes(packet)
            copy = av.Packet(bytes([data[0] & ~16 if index == 5 else data[0]]) + data[1:])
            copy.pts, copy.dts, copy.time_base, copy.stream = packet.pts, packet.dts, packet.time_base, stream
            copy.is_keyframe = packet.is_keyframe
            container.mux(copy)
    info, found = read_frames(tmp_path / "a.webm", lambda info: range(info.num_frames))
    assert info.num_frames == 11
    assert [index_of(frame) for frame in found] == [0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 11]


def test_avi_has_times_of_decoding_alone(tmp_path: Path) -> None:
    path = write_stream(tmp_path / "a.avi", counting_frames(30), codec="mpeg4", options={"bf": "2"})
    info, frames = read_frames(path, lambda info: [0, 8, 29])
    assert (info.num_frames, info.fps, info.times_s) == (30, 16, None)
    assert [index_of(frame) for frame in frames] == [0, 8, 29]
