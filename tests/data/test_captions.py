"""Tables of clips: every form that is promised, checked against what was written into it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict, Features, Value, Video

from qvgen.cli import main
from qvgen.data.captions import ClipTable, read_table

CAPTIONS = {"a.mp4": "a red square, moving", "deep/001.mp4": 'it says "None"\nand more', "None.mp4": "null"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in CAPTIONS:
        (tmp_path / "clips" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "clips" / name).write_bytes(name.encode())
    return tmp_path / "clips"


def write_csv(path: Path, *, columns: tuple[str, str], extra: str = "") -> Path:
    lines = [",".join(columns) + (",extra" if extra else "")]
    lines += [f'{name},"{text.replace(chr(34), chr(34) * 2)}"{extra}' for name, text in CAPTIONS.items()]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def assert_is_the_table(table: ClipTable, folder: Path) -> None:
    assert {clip.name: clip.caption for clip in table} == CAPTIONS
    assert [clip.name for clip in table] == list(CAPTIONS)  # in its order
    assert [clip.path for clip in table] == [folder / name for name in CAPTIONS]
    assert table[-1] == table[len(CAPTIONS) - 1]
    with pytest.raises(IndexError):
        table[len(CAPTIONS)]
    with table[1].local_file() as path:
        assert path.read_bytes() == b"deep/001.mp4"


def test_folder_with_metadata_csv(folder: Path) -> None:
    write_csv(folder / "metadata.csv", columns=("file_name", "text"))
    assert_is_the_table(read_table(folder), folder)


def test_folder_with_metadata_jsonl(folder: Path) -> None:
    lines = [json.dumps({"text": text, "file_name": name, "score": 0.5}) for name, text in CAPTIONS.items()]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    assert_is_the_table(read_table(folder), folder)


def test_folder_with_metadata_parquet(folder: Path) -> None:
    rows = {"file_name": list(CAPTIONS), "text": list(CAPTIONS.values())}
    Dataset.from_dict(rows).to_parquet(str(folder / "metadata.parquet"))
    assert_is_the_table(read_table(folder), folder)


def test_csv_like_openvid_with_its_videos_elsewhere(folder: Path, tmp_path: Path) -> None:
    table = write_csv(tmp_path / "OpenVid.csv", columns=("video", "caption"), extra=",5.2")
    assert_is_the_table(read_table(table, videos=folder), folder)
    with pytest.raises(ValueError, match=r"a\.mp4 and 2 more videos .* write data\.videos=FOLDER"):
        read_table(table)


@pytest.mark.parametrize("split", [False, True])
def test_data_set_on_disk(folder: Path, tmp_path: Path, split: bool) -> None:
    rows = {"video": [str(folder / name) for name in CAPTIONS], "caption": list(CAPTIONS.values())}
    dataset = Dataset.from_dict(rows, features=Features({"video": Video(decode=False), "caption": Value("string")}))
    (DatasetDict({"train": dataset}) if split else dataset).save_to_disk(str(tmp_path / "disk"))
    table = read_table(tmp_path / "disk")
    assert [clip.data for clip in table] == [name.encode() for name in CAPTIONS]  # save_to_disk takes the bytes along
    assert [clip.caption for clip in table] == list(CAPTIONS.values())


def test_data_set_on_disk_with_names_alone(folder: Path, tmp_path: Path) -> None:
    Dataset.from_dict({"video": list(CAPTIONS), "text": list(CAPTIONS.values())}).save_to_disk(str(tmp_path / "disk"))
    assert_is_the_table(read_table(tmp_path / "disk", videos=folder), folder)


def test_data_set_that_holds_the_bytes(tmp_path: Path) -> None:
    rows = {"video": [{"bytes": b"abc", "path": "x.mp4"}, {"bytes": b"de", "path": None}], "caption": ["one", "two"]}
    features = Features({"video": Video(decode=False), "caption": Value("string")})
    Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path / "disk"))
    table = read_table(tmp_path / "disk")
    assert [(clip.name, clip.path, clip.data) for clip in table] == [("x.mp4", None, b"abc"), ("row-1", None, b"de")]
    with table[0].local_file() as path:
        assert (path.suffix, path.read_bytes()) == (".mp4", b"abc")
    assert not path.exists()


def test_a_changed_table_is_read_anew(folder: Path) -> None:
    for caption in ("first", "later"):  # of one length, and within one second
        (folder / "metadata.csv").write_text(f"file_name,text\na.mp4,{caption}\n")
        assert read_table(folder)[0].caption == caption


def test_rows_without_name_or_text_are_kept_to_be_reported(folder: Path) -> None:
    (folder / "metadata.csv").write_text("file_name,text\na.mp4,\n,words\n")
    table = read_table(folder)
    assert [clip.caption for clip in table] == ["", "words"]
    assert "row 1 without a name" in table[1].name


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, r"has 2 videos \(None.mp4, a.mp4\) and no captions that are known; write metadata.csv"),
        ({"metadata.csv": "file_name,text\n", "metadata.jsonl": "{}"}, "has 2 metadata files .*; write data.path="),
        ({"metadata.csv": "file_name,text\n"}, "has no row"),
        ({"metadata.csv": ""}, r"columns \(none\); one must be called file_name or video"),
        (
            {"metadata.csv": "name,text\na.mp4,x\n"},
            "columns name, text; one must be called file_name or video, or write",
        ),
        ({"metadata.csv": "file_name,words\na.mp4,x\n"}, "one must be called text or caption, or write data.caption_"),
        ({"metadata.csv": "file_name,text\nb.mp4,x\n"}, r"b\.mp4 and 0 more videos"),
        ({"metadata.csv": "file_name,text\na.mp4,x,y,z\nb"}, "metadata.csv, line 2: 4 fields for 2 columns"),
        ({"metadata.csv": "file_name,text\na.mp4,\n"}, "has no caption in any of its 1 rows"),
        (
            {"metadata.csv": "file_name,text\nhttps://x.y/a.mp4,x\n"},
            "has addresses, such as https://x.y/a.mp4, and no files",
        ),
        ({"metadata.csv": "file_name,text\nD:\\a.mp4,x\n"}, "has names with backslashes, such as D:.a.mp4"),
        ({"metadata.jsonl": "{ no json"}, "metadata.jsonl, line 1: no JSON"),
        ({"metadata.parquet": "no parquet"}, "metadata.parquet can't be read as Parquet"),
    ],
)
def test_bad_tables_are_refused_with_what_to_do(folder: Path, files: dict[str, str], message: str) -> None:
    for name, text in files.items():
        (folder / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_table(folder)


def test_what_is_no_table_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="data.path=.*absent does not exist"):
        read_table(tmp_path / "absent")
    for path in ("~nobody-of-this-name/clips", "x" * 5000):
        with pytest.raises(ValueError, match="data.path=.* does not exist"):
            read_table(path)
    with pytest.raises(ValueError, match=r"a\.mp4 is no table"):
        read_table(folder / "a.mp4")
    DatasetDict({"test": Dataset.from_dict({"video": ["a"], "caption": ["b"]})}).save_to_disk(str(tmp_path / "disk"))
    with pytest.raises(ValueError, match=r"no split train \(there are: test\)"):
        read_table(tmp_path / "disk")


def test_files_that_are_not_there_are_counted(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    (folder / "metadata.csv").write_text(
        "file_name,text\na.mp4,x\nlost.mp4,y\ndeep/001.mp4,z\ngone/b.mp4,\na.mp4,other\ndeep,w\n"
    )
    table = read_table(folder)
    assert table.missing() == ["lost.mp4", "gone/b.mp4", "deep"]  # a folder is no video
    facts = [
        r"CSV, columns file_name, text, 6 rows", r"without a caption: 1 \(gone/b\.mp4\)",
        r"several rows: 1, with different captions: 1 \(a\.mp4\)",
    ]  # fmt: skip
    summary = table.summary()
    (missing,) = (line for line in summary if "missing" in line)
    assert f"{folder}; missing: 3 (lost.mp4, gone/b.mp4, deep)" in missing
    read_table(folder)  # said once, however often it is opened
    logged = [message for message in caplog.messages if str(folder) in message]
    for lines in ([line for line in summary if line != missing], logged):
        assert len(lines) == len(facts)
        assert all(re.search(fact, line) for fact, line in zip(facts, lines, strict=True))


def test_names_start_from_the_working_folder_too(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "table.csv").write_text("path,text\nclips/a.mp4,x\n")
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / "table.csv").write_text("path,text\nclips/a.mp4,x\n")
    monkeypatch.chdir(tmp_path)
    for table in ("table.csv", "tables/table.csv"):
        assert read_table(Path(table))[0].path.resolve() == folder / "a.mp4"
    monkeypatch.chdir(folder)
    with pytest.raises(ValueError, match=r"a\.mp4 and 0 more videos .* do not exist; write data.videos=FOLDER"):
        read_table(tmp_path / "tables" / "table.csv")
    with pytest.raises(ValueError, match="data.videos=.*absent is no folder"):
        read_table(tmp_path / "table.csv", videos=tmp_path / "absent")


def test_bytes_of_a_table_are_never_missing(tmp_path: Path) -> None:
    features = Features({"video": Video(decode=False), "caption": Value("string")})
    rows = [{"bytes": b"abc", "path": "x.mp4"}, {"bytes": None, "path": "y.mp4"}]
    dataset = Dataset.from_dict({"video": rows, "caption": ["one", "two"]}, features=features)
    for group in (1, 2):  # row groups that are told by their counts, and one that is not
        pq.write_table(dataset.data.table, tmp_path / f"{group}.parquet", row_group_size=group)
        table = read_table(tmp_path / f"{group}.parquet")
        assert [(clip.path, clip.data) for clip in table] == [(None, b"abc"), (tmp_path / "y.mp4", None)]
        assert table.missing() == ["y.mp4"]


def test_a_dry_run_says_what_is_missing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "t.csv").write_text('clip,words,text\na.mp4,"a boat, at sea",x\nlost.mp4,y,z\n')
    keys = ["model=cogvideox", f"data.path={folder / 't.csv'}", "dry_run=true"]
    columns = ["data.video_column=clip", "data.caption_column=words"]
    assert main(["precompute", *keys]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "clip, words, text" in line
    assert "data.video_column=NAME" in line
    for command in (["precompute"], ["ptq", "init=rtn"]):
        assert main([*command, *keys, *columns]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert "table: CSV, columns clip, words, 2 rows" in lines
        assert f"video files: in {folder}; missing: 1 (lost.mp4)" in lines
