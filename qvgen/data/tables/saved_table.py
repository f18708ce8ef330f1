"""A folder that `datasets` wrote with save_to_disk: names, or bytes as a column Video holds them; its split ``train``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from qvgen.data.tables.columns import Columns, choose_columns
from qvgen.data.tables.parquet_table import check_types
from qvgen.data.tables.rows import Rows, as_name, as_text
from qvgen.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

MARKS = ("dataset_dict.json", "state.json")
"""A folder with one of these was written by save_to_disk."""

_ROWS_AT_ONCE = 1000


def read(path: Path, *, wished: Columns) -> Rows:
    """Read a data set; the bytes of its videos stay on the disk until they are asked for.

    Raises:
        UserError: It is damaged, has no split ``train``, or no columns of videos and captions that hold such.
    """
    try:
        return _read(path, wished=wished)
    except UserError:
        raise
    except Exception as error:  # pyarrow, json and `datasets` have each their own for a folder that they can't read
        raise UserError(f"{path} can't be read as a data set: {' '.join(str(error).split())[:200]}") from error


def _read(path: Path, *, wished: Columns) -> Rows:
    from datasets import Video

    dataset = _load(path)
    video, caption = choose_columns(dataset.column_names, wished=wished, where=path)
    check_types(dataset.features.arrow_schema, video=video, caption=caption, where=path)
    dataset = dataset.select_columns([video, caption]).cast_column(video, Video(decode=False))
    names: list[str] = []
    captions: list[str] = []
    holds_bytes: list[bool] = []
    for batch in dataset.with_format("arrow").iter(_ROWS_AT_ONCE):
        where = f"{path}, row"
        start = len(names) + 1
        videos = batch.column(video).combine_chunks()
        paths = videos.field("path").to_pylist()
        holds_bytes += videos.field("bytes").is_valid().to_pylist()
        names += [as_name(name, where=where, column=video, number=i) for i, name in enumerate(paths, start)]
        texts = batch.column(caption).to_pylist()
        captions += [
            as_text(text, where=where, column=caption, number=i).strip() for i, text in enumerate(texts, start)
        ]
    return Rows(
        names=names,
        captions=captions,
        what=f"data set of save_to_disk, columns {video}, {caption}{' with the bytes' if any(holds_bytes) else ''}",
        folder=path,
        read_bytes=(lambda row: (dataset[row][video] or {}).get("bytes")) if any(holds_bytes) else None,
        holds_bytes=holds_bytes if any(holds_bytes) else (),
    )


def _load(path: Path) -> Dataset:
    from datasets import DatasetDict, load_from_disk

    loaded = load_from_disk(str(path))
    if not isinstance(loaded, DatasetDict):
        return loaded
    if "train" not in loaded:
        raise UserError(f"{path} has no split train (there are: {', '.join(loaded)}); give the split's folder")
    return loaded["train"]
