"""The table of clips: which video files there are and what their captions say.

A table is one of

    a folder      with metadata.csv, metadata.jsonl or metadata.parquet (columns file_name, text) and the videos
    a file        .csv, .jsonl or .parquet, such as OpenVid's (columns video, caption)
    a data set    a folder that `datasets` wrote with save_to_disk; its split `train` where it has several

and is read by `datasets` with Video(decode=False): names and texts alone, no video is opened. All values are taken as text
("001" stays "001", "None" stays "None"). Names are relative to the table's folder or to ``videos``.

Left out: metadata files in subfolders, tables on the hub, other audio-visual columns.
"""

from __future__ import annotations

import csv
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from qvgen.config.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

METADATA_FILES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
VIDEO_COLUMNS = ("file_name", "video")
CAPTION_COLUMNS = ("text", "caption")

_LOOKED_AT = 100
"""Rows whose files must not all be missing; looking at a million files would take minutes."""


@dataclass(frozen=True, kw_only=True)
class Clip:
    """One row of a table.

    Attributes:
        name: The file's name as the table has it; names the clip in reports.
        path: The file; None where the table holds the bytes themselves.
        data: The file's bytes, or None.
        caption: What the clip shows; empty where the table has no text.
    """

    name: str
    path: Path | None
    data: bytes | None
    caption: str

    @contextmanager
    def local_file(self) -> Iterator[Path]:
        """A path to the clip's bytes, for as long as the context lasts."""
        if self.path is not None:
            yield self.path
            return
        assert self.data is not None, "a clip has a path or bytes"
        with tempfile.NamedTemporaryFile(suffix=Path(self.name).suffix) as file:
            file.write(self.data)
            file.flush()
            yield Path(file.name)


class ClipTable(Sequence[Clip]):
    """The rows of a table, in its order.

    Args:
        dataset: With the columns ``video``, Video(decode=False), and ``caption``, text.
        folder: What relative names are relative to.
    """

    def __init__(self, dataset: Dataset, *, folder: Path) -> None:
        self._dataset = dataset
        self.folder = folder

    def __len__(self) -> int:
        """Number of clips."""
        return len(self._dataset)

    @overload
    def __getitem__(self, index: int) -> Clip: ...
    @overload
    def __getitem__(self, index: slice) -> list[Clip]: ...
    def __getitem__(self, index: int | slice) -> Clip | list[Clip]:
        """Row ``index``; no file is touched.

        Raises:
            IndexError: There is no such row.
        """
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        row = self._dataset[index]
        video: dict[str, Any] = row["video"] or {}
        name, data = video.get("path") or "", video.get("bytes")
        if data is None and not name:
            name = f"(row {index % len(self)} without a name)"
        path = None if data is not None else self.folder / name
        return Clip(
            name=name or f"row-{index % len(self)}", path=path, data=data, caption=(row["caption"] or "").strip()
        )


def read_table(path: Path | str, *, videos: Path | str | None = None) -> ClipTable:
    """Read a table of clips.

    Args:
        path: Folder with a metadata file, table file, or data set on disk; see the module's head.
        videos: Folder that relative names start from; None: the table's own.

    Raises:
        UserError: There is no table, it has other columns or no row, or none of its first 100 videos exists.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"data.path={path} does not exist; give a folder of videos with metadata.csv, or a table")
    own_folder = path if path.is_dir() else path.parent
    with _quiet():
        dataset = _load(path)
        _check_columns(dataset.column_names, path)
        table = ClipTable(_two_columns(dataset), folder=Path(videos) if videos is not None else own_folder)
    if len(table) == 0:
        raise UserError(f"{path} has no row; give a table with a clip or more")
    first = table[:_LOOKED_AT]
    if not any(clip.path is None or clip.path.is_file() for clip in first):
        raise UserError(
            f"{first[0].path} and {len(first) - 1} more videos of {path} do not exist; "
            "write data.videos=FOLDER for the folder that their names start from"
        )
    return table


def _load(path: Path) -> Dataset:
    """The table as it is, every column."""
    from datasets import Dataset, DatasetDict, load_from_disk

    if path.is_dir():
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            loaded = load_from_disk(str(path))
            if isinstance(loaded, DatasetDict):
                if "train" not in loaded:
                    raise UserError(
                        f"{path} has no split train (there are: {', '.join(loaded)}); give the split's folder"
                    )
                loaded = loaded["train"]
            return loaded
        found = [path / name for name in METADATA_FILES if (path / name).is_file()]
        if len(found) != 1:
            what = "no" if not found else f"{len(found)} metadata files, not one"
            raise UserError(
                f"{path} has {what} {', '.join(METADATA_FILES)}; write one with the columns file_name, text"
            )
        path = found[0]
    readers = {".csv": _read_csv, ".jsonl": Dataset.from_json, ".parquet": Dataset.from_parquet}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise UserError(f"{path} is no table; give a .csv, .jsonl or .parquet file, or a folder with one")
    try:
        # The copy that `datasets` makes of a table is not kept: it would be found again by the file's date alone.
        with tempfile.TemporaryDirectory() as temporary:
            return reader(str(path), cache_dir=temporary, keep_in_memory=True)
    except UserError:
        raise
    except Exception as error:  # pandas, pyarrow and `datasets` have each their own for a file that they can't read
        cause = error.__cause__ or error
        raise UserError(f"{path} can't be read as a table: {' '.join(str(cause).split())[:200]}") from error


def _read_csv(path: str, *, cache_dir: str, keep_in_memory: bool) -> Dataset:
    """A CSV file with every column as text."""
    from datasets import Dataset, Features, Value

    with Path(path).open(newline="", encoding="utf-8-sig") as file:
        header = next(csv.reader(file), [])
    _check_columns(header, Path(path))
    features = Features({name: Value("string") for name in header})
    return Dataset.from_csv(
        path,
        features=features,
        cache_dir=cache_dir,
        keep_in_memory=keep_in_memory,
        keep_default_na=False,
        encoding="utf-8-sig",
    )


def _check_columns(names: Sequence[str], path: Path) -> None:
    for wanted in (VIDEO_COLUMNS, CAPTION_COLUMNS):
        if not set(wanted) & set(names):
            raise UserError(
                f"{path} has the columns {', '.join(names) or '(none)'}; one must be called {' or '.join(wanted)}"
            )


def _two_columns(dataset: Dataset) -> Dataset:
    """Keep the video as Video(decode=False) and the caption as text, under these names."""
    from datasets import Value, Video

    video = next(name for name in VIDEO_COLUMNS if name in dataset.column_names)
    caption = next(name for name in CAPTION_COLUMNS if name in dataset.column_names)
    dataset = dataset.select_columns([video, caption])
    if video != "video":
        dataset = dataset.rename_column(video, "video")
    if caption != "caption":
        dataset = dataset.rename_column(caption, "caption")
    return dataset.cast_column("video", Video(decode=False)).cast_column("caption", Value("string"))


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars of `datasets` while a table is read."""
    from datasets.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

    before = is_progress_bar_enabled()
    disable_progress_bar()
    try:
        yield
    finally:
        if before:
            enable_progress_bar()
