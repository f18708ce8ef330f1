"""JSON and JSON Lines against what was written: values one by one, and what is no text refused with its line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qvgen.data.tables.columns import Columns
from qvgen.data.tables.json_table import read
from qvgen.errors import UserError

A, B = {"file_name": "a.mp4", "text": "a boat"}, {"file_name": "b.mp4", "text": 'a "tree"'}
ROWS = [("a.mp4", "a boat"), ("b.mp4", 'a "tree"')]


def rows_of(path: Path, content: str | bytes, **wished: str) -> list[tuple[str, str]]:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    rows = read(path, wished=Columns(**wished))
    return list(zip(rows.names, rows.captions, strict=True))


def lines(*values: object) -> str:
    return "".join(json.dumps(value) + "\n" for value in values)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("t.jsonl", lines(A, B), ROWS),
        ("t.jsonl", lines(A, B).replace("\n", "\r\n\r\n"), ROWS),
        ("t.jsonl", lines(A, B).encode("utf-8-sig"), ROWS),
        ("t.jsonl", lines(A, B).encode("utf-16"), ROWS),
        ("t.jsonl", json.dumps([A, B], indent=1), ROWS),
        ("t.json", json.dumps([A, B]), ROWS),
        ("t.json", json.dumps([A, B], indent=2), ROWS),
        ("t.json", lines(A, B), ROWS),
        ("t.json", json.dumps(A, indent=2), ROWS[:1]),
        ("t.json", json.dumps(dict(ROWS), indent=2), ROWS),
        ("t.json", json.dumps({"a.mp4": ["a boat"], "b.mp4": ['a "tree"']}), ROWS),
        ("t.jsonl", lines({**A, "score": 3, "tags": ["x", {"y": 1}]}, {**B, "score": "high"}), ROWS),
        ("t.jsonl", lines(A, {"file_name": "b.mp4"}, {"file_name": "c.mp4", "text": None}),
         [*ROWS[:1], ("b.mp4", ""), ("c.mp4", "")]),
        ("t.jsonl", lines({"file_name": "a.mp4", "text": "one\u2028two"}), [("a.mp4", "one\u2028two")]),
        ("t.json", json.dumps([{"path": "a.mp4", "fps": 30.0, "cap": ["a boat"]}]), ROWS[:1]),
        ("t.jsonl", lines({"video_path": "/x/a.mp4", "caption": "007"}), [("/x/a.mp4", "007")]),
        ("t.jsonl", lines({**A, "text": "2020-01-01"}), [("a.mp4", "2020-01-01")]),  # no date, as pyarrow takes it for
    ],
)  # fmt: skip
def test_values_are_read_as_they_are_written(
    tmp_path: Path, name: str, content: str | bytes, expected: list[tuple[str, str]]
) -> None:
    assert rows_of(tmp_path / name, content) == expected


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "t.jsonl",
            lines(A, {**B, "text": 5}),
            r"line 2: text is a number \(5\), not text; write one text in double quotes",
        ),
        ("t.jsonl", lines(A, {**B, "text": True}), "line 2: text is true or false"),
        ("t.jsonl", lines(A, {**B, "text": ["one", "two"]}), r"line 2: text is a list of 2 \(\['one', 'two'\]\)"),
        ("t.jsonl", lines(A, {**B, "text": {"en": "x"}}), "line 2: text is an object"),
        ("t.jsonl", lines(A, {**B, "text": [3]}), "line 2: text is a number"),
        ("t.jsonl", lines(A, {**B, "file_name": 3}), "line 2: file_name is a number"),
        ("t.jsonl", lines(A) + "\n" + lines([B]), r"line 3: \[.* is no JSON object"),
        ("t.jsonl", lines(A) + json.dumps(B)[:-3], r"line 2: no JSON \("),
        ("t.jsonl", json.dumps(A, indent=2), "line 1: no JSON .* write one JSON object to a line"),
        (
            "t.jsonl",
            '{"file_name": "a.mp4", "text": "one", "text": "two"}',
            "line 1: .* 'text' stands in one object twice",
        ),
        ("t.jsonl", "[" * 100_000, "nested too deeply"),
        ("t.jsonl", '{"file_name": "a.mp4", "text": "x", "n": ' + "9" * 5000 + "}", "line 1: no JSON that can be read"),
        ("t.jsonl", lines({**A, "text": "half \ud83d"}), "line 1: text holds half a character"),
        ("t.jsonl", lines({**A, "file_name": "a\0.mp4"}), "line 1: file_name holds a NUL byte"),
        ("t.jsonl", lines(A).encode() + b'{"text": "caf\xe9"}\n', "line 2: byte 0xe9 is no UTF-8"),
        ("t.jsonl", "", "has no row"),
        (
            "t.jsonl",
            lines({"file": "a.mp4", "words": "x"}),
            "columns file, words; one must be called file_name or video",
        ),
        ("t.json", json.dumps({"file_name": {"0": "a.mp4"}, "text": {"0": "x"}}), r"orient='records', lines=True"),
        ("t.json", json.dumps({"file_name": ["a", "b"], "text": ["x", "y"]}), "write a list of objects"),
        ("t.json", json.dumps([A, {**B, "text": 5}]), "entry 2: text is a number"),
        ("t.json", json.dumps([A, B])[:-4], r"t.json: no JSON \("),
        ("t.json", "3", "holds 3; write a list of objects"),
    ],
)
def test_what_is_not_clear_is_refused_with_its_line(
    tmp_path: Path, name: str, content: str | bytes, message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        rows_of(tmp_path / name, content)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_named_columns_are_taken(tmp_path: Path) -> None:
    content = lines({**A, "long": "a red boat", "where": "b.mp4"})
    assert rows_of(tmp_path / "t.jsonl", content, video="where", caption="long") == [("b.mp4", "a red boat")]
    with pytest.raises(UserError, match="no column data.caption_column=lang; did you mean 'long'"):
        rows_of(tmp_path / "t.jsonl", content, caption="lang")
