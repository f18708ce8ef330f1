"""CSV and TSV against what was written: every field as it stands, or the file and the line that are wrong."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from qvgen.data.tables.columns import Columns
from qvgen.data.tables.csv_table import read
from qvgen.errors import UserError


def rows_of(path: Path, content: str | bytes, **wished: str) -> list[tuple[str, str]]:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    rows = read(path, wished=Columns(**wished))
    return list(zip(rows.names, rows.captions, strict=True))


@pytest.fixture
def table(tmp_path: Path) -> Path:
    return tmp_path / "t.csv"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("file_name,text\na.mp4,a boat\n", [("a.mp4", "a boat")]),
        ('text,file_name\n"a red boat, at sea",a.mp4\n', [("a.mp4", "a red boat, at sea")]),
        ("file_name,text\r\na.mp4,a boat\r\n\r\n", [("a.mp4", "a boat")]),
        ("file_name,text\ra.mp4,a boat\r", [("a.mp4", "a boat")]),
        (",file_name,text\n0,a.mp4,a boat\n1,b.mp4,a tree\n", [("a.mp4", "a boat"), ("b.mp4", "a tree")]),
        ("Unnamed: 0,file_name,text\n0,a.mp4,a boat\n", [("a.mp4", "a boat")]),
        ("file_name,text,,\na.mp4,a boat,,\n", [("a.mp4", "a boat")]),
        ("file_name,text\na.mp4,a boat,\nb.mp4,a tree\n", [("a.mp4", "a boat"), ("b.mp4", "a tree")]),
        ('file_name,text\na.mp4,"she says ""hello"""\n', [("a.mp4", 'she says "hello"')]),
        ('file_name,text\na.mp4,6" of snow\n', [("a.mp4", '6" of snow')]),
        ("file_name,text\na.mp4 , a boat \n", [("a.mp4", "a boat")]),
        ('file_name,text\na.mp4, "a red boat, at sea"\n', [("a.mp4", "a red boat, at sea")]),
        ('file_name,text\na.mp4,"a boat\nat sea"\nb.mp4,x\n', [("a.mp4", "a boat\nat sea"), ("b.mp4", "x")]),
        ("file_name,text\n001,007\n1e5,1.0\n", [("001", "007"), ("1e5", "1.0")]),
        ("file_name,text\nNone,nan\nNA,TRUE\n", [("None", "nan"), ("NA", "TRUE")]),
        ("\n\nfile_name,text\n\na.mp4,a boat\n  \nb.mp4,a tree\n", [("a.mp4", "a boat"), ("b.mp4", "a tree")]),
        ("file_name,text\na.mp4,a boat\nfile_name,text\nb.mp4,x\n", [("a.mp4", "a boat"), ("b.mp4", "x")]),
        (" Video , Caption \na.mp4,a boat\n", [("a.mp4", "a boat")]),
        ("file_name\ttext\na.mp4\ta boat, at sea\n", [("a.mp4", "a boat, at sea")]),
        ("file_name;text;score\na.mp4;a boat, at sea;5,2\n", [("a.mp4", "a boat, at sea")]),
        ("file_name|text\na.mp4|a boat\n", [("a.mp4", "a boat")]),
        ("sep=;\nfile_name;text\na.mp4;a boat\n", [("a.mp4", "a boat")]),
        ("file_name,text\na.mp4,日本の船\n".encode(), [("a.mp4", "日本の船")]),
        ("file_name,text\na.mp4,日本の船\n".encode("utf-8-sig"), [("a.mp4", "日本の船")]),
        ("file_name,text\na.mp4,日本の船\n".encode("utf-16"), [("a.mp4", "日本の船")]),
        ("file_name\ttext\r\na.mp4\t日本の船\r\n".encode("utf-16"), [("a.mp4", "日本の船")]),  # Excel's "Unicode text"
        ("file_name,text,x\na.mp4,a boat," + "y" * 200_000 + "\n", [("a.mp4", "a boat")]),
    ],
)
def test_fields_are_read_as_they_are_written(
    table: Path, content: str | bytes, expected: list[tuple[str, str]]
) -> None:
    before = csv.field_size_limit()
    assert rows_of(table, content) == expected
    assert csv.field_size_limit() == before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "text,file_name\na red boat, at sea,a.mp4\n",
            'line 2: 3 fields for 2 columns .* in double quotes: "a red boat, at',
        ),
        (
            "file_name;text\na.mp4;a boat; at sea\n",
            'line 2: 3 fields .* caption with a semicolon in double quotes: "a red',
        ),
        ("file_name,text\na.mp4,x\n\nb.mp4\n", r"line 4: 1 field for 2 columns \(\['b.mp4'\]\); write all of them"),
        ('file_name,text\na.mp4,x\nb.mp4,"a boat\nc.mp4,x\n', "line 3: a quoted text has no end; write its closing"),
        ('file_name,text\na.mp4,"a \\"red\\" boat"\n', "line 2: a quoted text ends and goes on; .* within it twice"),
        ('file_name,text\na.mp4,"a" boat\n', "line 2: a quoted text ends and goes on"),
        ("file_name,text\na.mp4,a\0boat\n", r"line 2: text holds a NUL byte \('a\\x00boat'\)"),
        (b"file_name,text\na.mp4,x\nb.mp4,caf\xe9\n", "line 3: byte 0xe9 is no UTF-8; .* iconv -f cp1252 -t utf-8"),
        ("file_name,text\na.mp4,x\n".encode("utf-16-le"), "is text in UTF-16, not UTF-8; .* iconv -f utf-16le"),
        ("file_name,text\na.mp4,x\n".encode("utf-16-be"), "iconv -f utf-16be"),
        (b"PK\x03\x04rest", "is a zip or Excel file, not text; save it as CSV UTF-8"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "is a pointer of git-lfs .*; run git lfs pull"),
        ("file_name,text,text\na.mp4,x,y\n", "has the column text 2 times; give each a name of its own"),
        ("file_name,video,text\na.mp4,b.mp4,x\n", "write data.video_column=file_name or data.video_column=video"),
        ("file_name,text,caption\na.mp4,x,y\n", "write data.caption_column=text or data.caption_column=caption"),
        ("a.mp4,a boat\n", "has no first line that names its columns, such as file_name,text"),
        (
            "name,words\na.mp4,x\n",
            "has the columns name, words; one must be called file_name or video, or write data.video",
        ),
        ("", r"has the columns \(none\)"),
        ("file_name,text\n" + "a/" * 9 + "b" * 300 + ",x\n", r"line 2: file_name is no file's name \('a/a/"),
        ('file_name,text\na.mp4,"' + "x" * 2**25 + '"\n', "line 2: a quoted text has no end"),
    ],
)
def test_what_is_not_clear_is_refused_with_its_line(table: Path, content: str | bytes, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        rows_of(table, content)
    assert str(table) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_named_columns_are_taken(table: Path) -> None:
    content = "file_name,clip,text,long text\na.mp4,b.mp4,short,a long one\n"
    assert rows_of(table, content, video="clip", caption="long text") == [("b.mp4", "a long one")]
    assert rows_of(table, content, video="CLIP") == [("b.mp4", "short")]
    assert rows_of(table, "x;y\na.mp4;a boat\n", video="x", caption="y") == [("a.mp4", "a boat")]
    with pytest.raises(
        UserError, match=r"no column data.video_column=clp; did you mean 'clip'\?; it has file_name, clip"
    ):
        rows_of(table, content, video="clp")


def test_names_of_trainers_are_known(table: Path) -> None:
    for header in (
        "video,caption,fps",
        "video,prompt,vace",
        "path,text,num_frames",
        "video_path,caption,x",
        "path,cap,x",
    ):
        assert rows_of(table, f"{header}\na.mp4,a boat,3\n") == [("a.mp4", "a boat")]
    # one name of the first group decides, as it always has
    assert rows_of(table, "video,path,caption,prompt\na.mp4,/b.mp4,long,short\n") == [("a.mp4", "long")]
    with pytest.raises(UserError, match="path, video_path, of which one is meant"):
        rows_of(table, "path,video_path,text\na.mp4,b.mp4,x\n")


def test_a_header_that_stands_again_is_counted(table: Path) -> None:
    table.write_text("file_name,text\na.mp4,x\nfile_name,text\nb.mp4,y\n")
    assert read(table, wished=Columns()).notes == ("left out are more lines with the columns' names: 1",)
