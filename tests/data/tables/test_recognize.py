"""The layouts of other trainers and of the hub, written here as they write them; and what is no single one of them."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict, Features, Value, Video

from qvgen.data.captions import ClipTable, read_table
from qvgen.data.latent_cache import LatentCache
from qvgen.data.tables.columns import Columns
from qvgen.errors import UserError
from tests.data.pooling_encoder import SETTINGS, fill_with_pooling
from tests.data.video_files import write_clip

CLIPS = {"a.mp4": "a red boat, at sea", "b.mp4": "a tree"}


def put(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "clips"


def videos(folder: Path) -> Path:
    for name in CLIPS:
        put(folder / name, name)
    return folder


def assert_are_the_clips(table: ClipTable, what: str, *, prefix: str = "") -> None:
    """Each caption belongs to the file with the bytes that are its name."""
    found = {}
    for clip in table:
        with clip.local_file() as path:
            found[path.read_text()] = clip.caption
    assert found == CLIPS
    assert [clip.name for clip in table] == [f"{prefix}{name}" for name in CLIPS]
    assert what in table.what
    assert table.missing() == []


def csv_of(header: str, *, prefix: str = "") -> str:
    return f"{header}\n" + "".join(f'{prefix}{name},"{text}"\n' for name, text in CLIPS.items())


@pytest.mark.parametrize("header", ["video,caption", "video,prompt", "path,text", "file_name,text"])
def test_folder_with_one_csv_of_any_name(folder: Path, header: str) -> None:
    put(videos(folder) / "OpenVid-1M.csv", csv_of(header))
    put(folder / "notes.csv", "x,y\n1,2\n")  # a table of something else
    put(folder / "dataset_info.json", "{}")
    assert_are_the_clips(read_table(folder), f"CSV, columns {header.replace(',', ', ')}")


def test_hub_folder_with_splits(folder: Path) -> None:
    put(videos(folder / "train") / "metadata.csv", csv_of("file_name,text"))
    put(folder / "test" / "metadata.csv", "file_name,text\nc.mp4,other\n")
    assert_are_the_clips(read_table(folder), "CSV, columns file_name, text")


@pytest.mark.parametrize("names", [("videos.txt", "prompts.txt"), ("video.txt", "captions.txt")])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_finetrainers_lists(folder: Path, names: tuple[str, str], end: str) -> None:
    videos(folder / "videos")
    for name, values in zip(names, ([f"videos/{clip}" for clip in CLIPS], CLIPS.values()), strict=True):
        put(folder / name, "".join(f"{value}{end}" for value in values) + end)
    for path in (folder, folder / names[0]):
        assert_are_the_clips(read_table(path), f"{names[0]} and {names[1]}", prefix="videos/")


def test_lists_of_unequal_length_are_refused(folder: Path) -> None:
    put(folder / "videos.txt", "a.mp4\nb.mp4\n")
    put(folder / "prompts.txt", "one\n")
    with pytest.raises(UserError, match=r"videos.txt has 2 lines and prompts.txt has 1; line i of one belongs to"):
        read_table(folder)
    put(folder / "prompt.txt", "one\ntwo\n")
    with pytest.raises(UserError, match=r"data.caption_column=prompts.txt or data.caption_column=prompt.txt"):
        read_table(folder)
    videos(folder)
    table = read_table(folder, columns=Columns(caption="prompt.txt"))
    assert [clip.caption for clip in table] == ["one", "two"]
    with pytest.raises(UserError, match="data.video_column=other.txt is no file in"):
        read_table(folder, columns=Columns(video="other.txt", caption="prompt.txt"))


def test_same_named_text_files(folder: Path) -> None:
    for name, text in CLIPS.items():
        put((videos(folder) / name).with_suffix(".txt"), f"{text}\n")
    assert_are_the_clips(read_table(folder), "videos with .txt files of the same names")
    put(folder / "c.mp4", "c")
    put(folder / "readme.txt", "x")
    table = read_table(folder)
    assert [clip.caption for clip in table] == [*CLIPS.values(), ""]
    assert table.lost == (
        "left out are .txt files without a video: 1 (readme.txt)",
        "rows without a caption: 1 (c.mp4)",
    )
    with pytest.raises(UserError, match=r"data.caption_column=text: .* has no columns; leave the key out"):
        read_table(folder, columns=Columns(caption="text"))


def test_names_that_are_no_text_are_refused(folder: Path) -> None:
    folder.mkdir()
    for name in (b"caf\xe9.mp4", b"caf\xe9.txt"):
        with open(bytes(folder) + b"/" + name, "wb") as file:
            file.write(b"x")
    with pytest.raises(UserError, match=r"a file's name holds half a character \('caf.udce9.mp4'\)"):
        read_table(folder)


def test_same_named_text_files_in_linked_folders(folder: Path, tmp_path: Path) -> None:
    for name, text in CLIPS.items():
        put((videos(tmp_path / "disk") / name).with_suffix(".txt"), text)
    folder.mkdir()
    (folder / "linked").symlink_to(tmp_path / "disk")
    (tmp_path / "disk" / "back").symlink_to(folder)
    assert_are_the_clips(read_table(folder), "videos with .txt files", prefix="linked/")


def test_cogvideo_labels(folder: Path) -> None:
    videos(folder / "videos")
    for name, text in CLIPS.items():
        put(folder / "labels" / f"{name[0]}.txt", text)
    assert_are_the_clips(read_table(folder), "videos with .txt files", prefix="videos/")


def test_fastvideo_json(folder: Path) -> None:
    videos(folder / "videos")
    entries = [
        {"path": name, "resolution": {"width": 8, "height": 8}, "fps": 30.0, "duration": 1.0, "cap": [text]}
        for name, text in CLIPS.items()
    ]
    put(folder / "videos2caption.json", json.dumps(entries))
    assert_are_the_clips(read_table(folder), "JSON list, columns path, cap")
    assert read_table(folder).folder == folder / "videos"


def test_musubi_jsonl_and_configuration(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [json.dumps({"video_path": str(videos(folder) / name), "caption": text}) for name, text in CLIPS.items()]
    put(folder / "videos.jsonl", "\n".join(lines))
    assert_are_the_clips(
        read_table(folder / "videos.jsonl"), "JSON Lines, columns video_path, caption", prefix=f"{folder}/"
    )
    put((videos(folder / "more") / "a.mp4").with_suffix(".cap"), CLIPS["a.mp4"])
    put(folder / "more" / "b.cap", CLIPS["b.mp4"])
    configuration = """
        [general]
        resolution = [960, 544]
        caption_extension = ".cap"
        [[datasets]]
        video_directory = "more"
        target_frames = [1, 25]
        num_repeats = 5
        [[datasets]]
        video_directory = "more"
        target_frames = [49]
        [[datasets]]
        image_directory = "pictures"
    """
    path = put(folder / "dataset.toml", configuration)
    table = read_table(path)
    assert_are_the_clips(table, "musubi-tuner's configuration of 1 data set", prefix=f"{folder}/more/")
    assert table.lost == (
        "num_repeats of [[datasets]] 1 is left out: each clip stands once",
        "[[datasets]] 3 holds images and is left out",
    )
    monkeypatch.chdir(folder.parent)
    assert_are_the_clips(read_table("clips/dataset.toml"), "musubi-tuner's", prefix=f"{folder}/more/")
    with pytest.raises(UserError, match="data.videos=.* says itself where its videos are; leave the key out"):
        read_table(path, videos=folder)
    put(path, f'{configuration}\n[[datasets]]\nvideo_jsonl_file = "{folder}/videos.jsonl"\n')
    assert len(read_table(path)) == 4


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[[datasets]\n", "is no TOML"),
        ("a = 1\n", "names no videos; write"),
        ("datasets = 3\n", r"has no \[\[datasets\]\]"),
        ('[[datasets]]\nimage_directory = "x"\n', "names no videos"),
        ('[[datasets]]\nvideo_directory = "absent"\n', r"\[\[datasets\]\] 1: video_directory=absent does not exist"),
        ("[[datasets]]\nvideo_directory = 3\n", "video_directory=3 .* must be text"),
        (
            '[[datasets]]\nvideo_directory = "."\ncaption_extension = "x/y"\n',
            "caption_extension='x/y' ends no file's name",
        ),
        ("[[datasets]]\nbatch_size = 1\n", "must have one of video_directory and video_jsonl_file"),
    ],
)
def test_configurations_that_name_no_videos(folder: Path, content: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_table(put(folder / "dataset.toml", content))


def test_parquet_shards_with_bytes(folder: Path) -> None:
    features = Features({"video": Video(decode=False), "caption": Value("string")})
    for index, (name, text) in enumerate(CLIPS.items()):
        shard = Dataset.from_dict(
            {"video": [{"bytes": name.encode(), "path": name}], "caption": [text]}, features=features
        )
        put(folder / "data" / "x", "")
        shard.to_parquet(str(folder / "data" / f"train-0000{index}-of-00003.parquet"))
        shard.to_parquet(str(folder / "data" / f"test-0000{index}-of-00002.parquet"))
    table = read_table(folder)
    assert_are_the_clips(table, "2 Parquet files, columns video, caption with the bytes")
    assert table.lost == ("1 of 3 shards are not there",)
    assert table[1].data == b"b.mp4"


def test_parquet_of_plain_bytes_in_row_groups(folder: Path) -> None:
    names = [f"{i}.mp4" for i in range(7)]
    columns = {"mp4": [name.encode() for name in names], "prompt": [f"clip {name}" for name in names]}
    folder.mkdir()
    pq.write_table(pa.table(columns), folder / "x.parquet", row_group_size=3)
    table = read_table(folder / "x.parquet")
    for row in (6, 0, 3, 2, 5):
        assert (table[row].name, table[row].data) == (f"row-{row}", names[row].encode())
    assert [clip.caption for clip in table] == columns["prompt"]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"video": ["a.mp4"], "caption": [3]}, "the column caption holds int64, not text"),
        ({"video": ["a.mp4"], "caption": [["x", "y"]]}, "the column caption holds list<.*>, not text"),
        ({"video": [3], "caption": ["x"]}, "the column video holds int64, neither names nor bytes of videos"),
        ({"video": [{"a": 1}], "caption": ["x"]}, "the column video holds struct<"),
    ],
)
def test_typed_columns_that_hold_something_else(folder: Path, columns: dict[str, list], message: str) -> None:
    folder.mkdir()
    pq.write_table(pa.table(columns), folder / "x.parquet")
    with pytest.raises(UserError, match=message):
        read_table(folder / "x.parquet")
    Dataset.from_dict(columns).save_to_disk(str(folder / "disk"))
    with pytest.raises(UserError, match=message):
        read_table(folder / "disk")


def test_damaged_data_sets(folder: Path) -> None:
    DatasetDict({"train": Dataset.from_dict({"video": ["a.mp4"], "text": ["x"]})}).save_to_disk(str(folder))
    put(folder / "train" / "state.json", "{")
    with pytest.raises(UserError, match="can't be read as a data set"):
        read_table(folder)


def write_tar(path: Path, files: Mapping[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def test_webdataset(folder: Path) -> None:
    for index, (name, text) in enumerate(CLIPS.items()):
        files = {name: name.encode(), f"{name[0]}.json": b'{"caption": "another", "duration": 3}'}
        write_tar(folder / f"0000{index}.tar", {f"{name[0]}.txt": text.encode(), **files})
    table = read_table(folder)
    assert [clip.name for clip in table] == ["00000.tar/a.mp4", "00001.tar/b.mp4"]
    assert {clip.caption for clip in table} == set(CLIPS.values())
    for clip, content in zip(table, CLIPS, strict=True):
        with clip.local_file() as path:
            assert (path.read_text(), path.suffix) == (content, ".mp4")
        assert not path.exists()
    assert {clip.caption for clip in read_table(folder, columns=Columns(caption="caption"))} == {"another"}
    assert sorted(path.name for path in folder.iterdir()) == ["00000.tar", "00001.tar"]  # nothing was unpacked
    with pytest.raises(UserError, match=r"data.videos=.* holds the bytes of its videos itself"):
        read_table(folder, videos=folder)


def test_names_in_an_archive_lead_nowhere(folder: Path, tmp_path: Path) -> None:
    names = ("../../out.mp4", f"{tmp_path}/absolute.mp4", "x.m/../p4")
    files = dict.fromkeys(names[:2], b"clip") | {"../../out.txt": b"one", f"{tmp_path}/absolute.txt": b"two"}
    table = read_table(write_tar(folder / "x.tar", files))
    for clip in table:
        with clip.local_file() as path:
            assert path.parent not in (tmp_path, tmp_path.parent, folder)
            assert path.read_bytes() == b"clip"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clips"]


def test_archives_that_are_damaged(folder: Path) -> None:
    whole = write_tar(folder / "x.tar", {"a.mp4": b"x" * 5000, "a.txt": b"one", "c.json": b"{}"}).read_bytes()
    assert read_table(folder / "x.tar").lost == ("left out are samples without a video: 1 (x.tar: c)",)
    put(folder / "x.tar", whole[:3000])
    with pytest.raises(UserError, match=r"x.tar can't be read as a tar archive"):
        read_table(folder)
    put(folder / "x.tar", b"no archive")
    with pytest.raises(UserError, match=r"x.tar can't be read as a tar archive"):
        read_table(folder)
    write_tar(folder / "x.tar", {"a.mp4": b"x", "a.json": b"{"})
    with pytest.raises(UserError, match=r"x.tar, a.json is no JSON"):
        read_table(folder)
    write_tar(folder / "x.tar", {"a.mp4": b"x", "a.txt": b"caf\xe9"})
    with pytest.raises(UserError, match=r"x.tar, a.txt is not UTF-8"):
        read_table(folder)
    write_tar(folder / "x.tar", {"a.mp4": b"x", "a.webm": b"y", "a.txt": b"one"})
    with pytest.raises(UserError, match=r"data.video_column=mp4 or data.video_column=webm"):
        read_table(folder)


def test_reasons_do_not_name_temporary_files(folder: Path) -> None:
    table = write_tar(folder / "x.tar", {"a.mp4": b"no video" * 99, "a.txt": b"one"})
    with pytest.raises(UserError, match=r"\(first: x.tar/a.mp4: the file holds no frame"):
        fill_with_pooling(table, folder / "cache")


def test_a_place_in_an_archive_is_told_from_another(folder: Path) -> None:
    cache = LatentCache(folder / "cache", settings=SETTINGS)
    files = {"a.mp4": b"one", "a.txt": b"same", "b.mp4": b"two", "b.txt": b"same"}
    first = [cache.row_key(clip) for clip in read_table(write_tar(folder / "x.tar", files))]
    assert len(set(first)) == 2
    assert [cache.row_key(clip) for clip in read_table(folder / "x.tar")] == first
    changed = read_table(write_tar(folder / "x.tar", files | {"a.mp4": b"one more"}))
    assert not set(first) & {cache.row_key(clip) for clip in changed}


def test_a_clip_is_the_same_in_every_form(folder: Path, tmp_path: Path) -> None:
    """Latents are found again by a clip's bytes, whether it lies in a folder, an archive or a Parquet file."""
    files = {}
    for index, (name, text) in enumerate(CLIPS.items()):
        write_clip(folder / name, 20 + index)
        put((folder / name).with_suffix(".txt"), text)
        files |= {name: (folder / name).read_bytes(), f"{name[0]}.txt": text.encode()}
    write_tar(tmp_path / "x.tar", files)
    columns = {"mp4": [files[name] for name in CLIPS], "caption": list(CLIPS.values())}
    pq.write_table(pa.table(columns), tmp_path / "x.parquet")
    for table, encoded in ((folder, 2), (tmp_path / "x.tar", 0), (tmp_path / "x.parquet", 0), (tmp_path / "x.tar", 0)):
        report = fill_with_pooling(table, tmp_path / "cache")
        assert (report.encoded, report.reused, report.bad, report.complete) == (encoded, 2 - encoded, (), True)


def test_more_than_one_form_is_refused_with_what_chooses(folder: Path) -> None:
    put(videos(folder) / "one.csv", csv_of("video,caption"))
    put(folder / "two.jsonl", json.dumps({"video": "a.mp4", "caption": "x"}))
    put(folder / "videos.txt", "a.mp4\nb.mp4")
    put(folder / "prompts.txt", "x\ny")
    with pytest.raises(
        UserError, match=r"clips in 3 forms \(videos.txt with prompts.txt; one.csv; two.jsonl\); write data.path="
    ):
        read_table(folder)
    for name in ("one.csv", "two.jsonl", "videos.txt"):
        assert len(read_table(folder / name)) >= 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("x.zip", "is compressed; unpack it"),
        ("x.tar.gz", "is compressed"),
        ("x.csv.gz", "is compressed"),
        ("x.mp4", "is no table"),
    ],
)
def test_files_that_are_no_table(folder: Path, name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_table(put(folder / name, "x"))


def test_a_folder_whose_only_table_has_other_columns(folder: Path) -> None:
    put(videos(folder) / "dataset.csv", "clip,words\na.mp4,x\n")
    with pytest.raises(UserError, match=r"dataset.csv has the columns clip, words; .* data.video_column=NAME"):
        read_table(folder)
    assert read_table(folder, columns=Columns(video="clip", caption="words"))[0].caption == "x"


def test_splits_without_train_are_refused(folder: Path) -> None:
    folder.mkdir()
    pq.write_table(pa.table({"video": ["a.mp4"], "caption": ["x"]}), folder / "test-00000-of-00001.parquet")
    with pytest.raises(UserError, match=r"has no split train \(test-00000-of-00001.parquet\); give one file"):
        read_table(folder)


def test_pointers_of_git_lfs_are_named(folder: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"
    for name in ("metadata.csv", "t.jsonl", "t.parquet", "t.tar"):
        with pytest.raises(UserError, match="is a pointer of git-lfs and not the file itself; run git lfs pull"):
            read_table(put(folder / name, pointer))
