"""Indexes of a cache by themselves: what was written is read, and nothing else."""

import json
from pathlib import Path

import pytest

from qvgen.data.cache_index import IndexRows, keep_state, read_index, read_state, state_of, write_index

ROW = {
    "row": 3, "name": "a.mp4", "caption": "a boat", "bucket": "49x480x720", "clip": "0" * 64, "latents": "1" * 64,
    "latents_sha256": "a" * 64, "text": "b" * 64, "text_sha256": "c" * 64,
    "left_out": {"clip_s": 2.5, "used_s": 2.0, "used_area": 0.75, "tokens": 0},
}  # fmt: skip


def test_rows_and_reasons_come_back(tmp_path: Path) -> None:
    rows = [ROW, ROW | {"row": 5, "name": "b.mp4", "caption": "ein Boot, é"}]
    write_index(
        tmp_path / "x.json", IndexRows.of(rows), bad=[("c.mp4", "it is too short"), ("a0.mp4", "there is no such file")]
    )
    found, bad = read_index(tmp_path / "x.json")
    assert list(found) == rows
    assert list(found[1:]) == list(found.chosen([1])) == rows[1:]
    assert bad == [["a0.mp4", "there is no such file"], ["c.mp4", "it is too short"]]
    write_index(tmp_path / "x.json", IndexRows.of([]), bad=[])
    assert [len(part) for part in read_index(tmp_path / "x.json")] == [0, 0]
    assert read_index(tmp_path / "y.json") is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("row", [3.0]),
        ("row", [True]),
        ("row", [3, 4]),
        ("row", 3),
        ("caption", [None]),
        ("name", [["a.mp4"]]),
        ("latents", ["../../../../etc/passwd"]),
        ("latents", ["1" * 63 + "\n"]),
        ("latents", ["1" * 63 + "G"]),
        ("text", ["1" * 128]),
        ("clip", [1]),
        ("used_s", ["1"]),
        ("used_s", [float("inf")]),
        ("tokens", [True]),
        ("more", [1]),
    ],
)
def test_a_column_of_another_form_is_no_index(name: str, value: object, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_index(path, IndexRows.of([ROW]), bad=[])
    index = json.loads(path.read_text())
    index["rows"][name] = value
    path.write_text(json.dumps(index))
    assert read_index(path) is None


def test_a_state_is_that_of_all_files_in_their_order(tmp_path: Path) -> None:
    files = [str(tmp_path / name) for name in "ab"]
    for size, file in enumerate(files):
        Path(file).write_bytes(b"x" * size)
    state = state_of(files)
    assert state == state_of(iter(files))
    assert state != state_of(files[::-1])
    assert state_of([*files, str(tmp_path / "c")]) is None
    assert read_state(tmp_path / "x.json") is None
    keep_state(tmp_path / "x.json", state or "")
    assert read_state(tmp_path / "x.json") == state
    Path(files[1]).write_bytes(b"y")
    assert state_of(files) != state
