"""Clips are read while those before them are encoded: the same ones in the same order, and nothing is left behind."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

import pytest
from torch import Tensor

from qvgen.data.cache_fill import FillOptions
from qvgen.data.captions import Clip, read_table
from qvgen.data.clips_ahead import ClipsAhead, ReadClip, Unreadable
from tests.data.pooling_encoder import SETTINGS, encode_video, fill_with_pooling
from tests.data.video_files import write_clip

NUM_CLIPS = 5


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    lines = ["file_name,text"]
    for index in range(NUM_CLIPS):
        write_clip(folder / f"{index}.mp4", 20 + index)
        lines.append(f"{index}.mp4,clip {index}")
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n")
    return folder


def files(folder: Path) -> dict[str, bytes]:
    """All files but the states of indexes, which hold the times of a folder's own files."""
    paths = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".state")
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def children() -> set[int]:
    """Numbers of this process's children."""
    tasks = [task.read_text().split() for task in Path("/proc/self/task").glob("*/children")]
    return {int(child) for some in tasks for child in some}


@pytest.mark.parametrize("readers", [1, 3])
def test_a_cache_has_the_same_bytes_with_any_number_of_readers(table: Path, tmp_path: Path, readers: int) -> None:
    seen: list[int] = []
    fill_with_pooling(table, tmp_path / "one")
    before = children()

    def encode(pixels: Tensor) -> Tensor:
        seen.append(len(children() - before))
        return encode_video(pixels)

    fill_with_pooling(table, tmp_path / "other", options=FillOptions(readers=readers), encode_video=encode)
    assert files(tmp_path / "one") == files(tmp_path / "other")
    assert len(seen) == NUM_CLIPS
    assert max(seen) == readers
    assert not children() - before


def test_the_next_clips_are_read_while_one_is_used(table: Path) -> None:
    clips = list(read_table(table))
    asked: list[str] = []

    def rows() -> Iterator[tuple[Clip, str | None]]:
        for index, clip in enumerate(clips):
            asked.append(clip.name)
            yield clip, "known" if index in (1, 4) else None

    with ClipsAhead(SETTINGS.cut, readers=2) as ahead:
        given = []
        for clip, known in ahead.in_order(rows()):
            given.append(clip.name)
            if len(given) == 1:
                assert asked == [clip.name for clip in clips[:4]]  # two are read, and one between them is known
            if clip.name in (clips[1].name, clips[4].name):
                assert known == "known"
            else:
                assert isinstance(known, Future)
                read = known.result()
                assert isinstance(read, ReadClip)
                assert read.frames.shape == (5, 32, 48, 3)
    assert given == asked == [clip.name for clip in clips]


def test_rows_that_are_known_do_not_wait(table: Path) -> None:
    clips, before = list(read_table(table)), children()
    with ClipsAhead(SETTINGS.cut, readers=2) as ahead:
        given = ahead.in_order((clip, "known") for clip in clips)
        assert [next(given)[1] for _ in range(NUM_CLIPS)] == ["known"] * NUM_CLIPS
        assert not children() - before


def test_leaving_ends_readers_at_work(tmp_path: Path) -> None:
    path = tmp_path / "sleeps"
    path.write_bytes(b"")
    clip, before = Clip(name="sleeps", caption="x", path=path, data=None), children()
    with ClipsAhead(SETTINGS.cut, readers=2, timeout_s=900) as ahead:
        for reader in ahead._readers:
            reader._answer = "tests.data.failing_worker:answer"
        _, reading = next(ahead.in_order((clip, None) for _ in range(4)))
        assert isinstance(reading, Future)
        began = time.monotonic()
        while len(children() - before) < 2:
            assert time.monotonic() - began < 300, "no reader was started"
            time.sleep(0.01)
    assert not children() - before
    assert reading.done()
    read = reading.result()
    assert isinstance(read, Unreadable)
    assert not read.again


def test_bad_clips_and_files_that_may_be_mended_are_told_apart(table: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video")
    clips = [
        Clip(name="broken.mp4", caption="x", path=broken, data=None),
        Clip(name="absent.mp4", caption="x", path=tmp_path / "absent.mp4", data=None),
        Clip(name="silent.mp4", caption="", path=broken, data=None),
    ]
    with ClipsAhead(SETTINGS.cut, readers=3) as ahead:
        read = [known.result() for _, known in ahead.in_order((clip, None) for clip in clips)]
    assert all(isinstance(entry, Unreadable) and not entry.again for entry in read)
    assert [entry.reason for entry in read][1:] == ["there is no such file", "it has no caption"]
    assert str(tmp_path) not in read[0].reason


def test_bad_numbers_are_refused_and_another_number_goes_on() -> None:
    with pytest.raises(ValueError, match="readers=0 must be 1 or more"):
        ClipsAhead(SETTINGS.cut, readers=0)
