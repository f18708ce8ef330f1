"""Parquet files, one or the shards of one data set, with the videos' names or their bytes.

Names and captions are read at once; bytes (a column of them, or of ``{bytes, path}`` as `datasets` writes) row group by row
group, when a clip is asked for: shards of mp4 files may be larger than the memory.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qvgen.data.tables.columns import Columns, choose_columns
from qvgen.data.tables.rows import Rows, as_name, as_text
from qvgen.data.tables.text_file import check_is_here
from qvgen.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq


def read(files: Sequence[Path], *, folder: Path, wished: Columns) -> Rows:
    """Read Parquet files.

    Args:
        files: In the order of their rows.
        folder: Folder that relative names start from.
        wished: The columns that the user names.

    Raises:
        UserError: One is damaged, or has no columns of videos and captions that hold such.
    """
    names: list[str] = []
    captions: list[str] = []
    starts: list[int] = []
    holds_bytes: list[bool] = []
    video = caption = path_field = bytes_field = None
    for file in files:
        opened = _open(file)
        chosen = choose_columns(opened.schema_arrow.names, wished=wished, where=file)
        if video is not None and chosen != (video, caption):
            raise UserError(f"{file} has the columns {', '.join(chosen)}, {files[0].name} has {video}, {caption}")
        video, caption = chosen
        path_field, bytes_field = check_types(opened.schema_arrow, video=video, caption=caption, where=file)
        starts.append(len(names))
        texts = _read(file, columns=[caption]).column(caption).to_pylist()
        where = f"{file}, row"
        captions += [as_text(text, where=where, column=caption, number=i).strip() for i, text in enumerate(texts, 1)]
        found = [None] * len(texts) if path_field is None else _flat(_read(file, columns=[path_field]))
        names += [as_name(name, where=where, column=video, number=i) for i, name in enumerate(found, 1)]
        if bytes_field is not None:
            holds_bytes += _holds(file, field=bytes_field)
    shards = f"{len(files)} Parquet files" if len(files) > 1 else "Parquet"
    return Rows(
        names=names,
        captions=captions,
        what=f"{shards}, columns {video}, {caption}{' with the bytes' if bytes_field else ''}",
        folder=folder,
        read_bytes=None if bytes_field is None else _Bytes(files, starts, field=bytes_field),
        holds_bytes=holds_bytes,
    )


def check_types(schema: pa.Schema, *, video: str, caption: str, where: object) -> tuple[str | None, str | None]:
    """Where names and bytes are: (field of names, field of bytes), as Parquet's dotted paths; None where there are none.

    Raises:
        UserError: The caption's column holds no text, or the video's neither names nor bytes.
    """
    import pyarrow.types as types

    def is_text(kind: pa.DataType) -> bool:
        if types.is_dictionary(kind):
            kind = kind.value_type
        return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind) or types.is_null(kind)

    def is_bytes(kind: pa.DataType) -> bool:
        return types.is_binary(kind) or types.is_large_binary(kind)

    kind = schema.field(caption).type
    if not is_text(kind):
        raise UserError(f"{where}: the column {caption} holds {kind}, not text; write data.caption_column=NAME for one")
    kind = schema.field(video).type
    if is_text(kind):
        return video, None
    if is_bytes(kind):
        return None, video
    fields = {field.name: field.type for field in kind} if types.is_struct(kind) else {}
    has_path = "path" in fields and is_text(fields["path"])
    has_bytes = "bytes" in fields and is_bytes(fields["bytes"])
    if not has_path and not has_bytes:
        raise UserError(
            f"{where}: the column {video} holds {kind}, neither names nor bytes of videos; "
            "write data.video_column=NAME for one that does"
        )
    return f"{video}.path" if has_path else None, f"{video}.bytes" if has_bytes else None


def _holds(path: Path, *, field: str) -> list[bool]:
    """Whether each row of a file has a value in a field; known from counts where all of a row group have one, or none."""
    opened = _open(path)
    found: list[bool] = []
    for index in range(opened.num_row_groups):
        group = opened.metadata.row_group(index)
        chunks = [group.column(i) for i in range(group.num_columns)]
        statistics = next(chunk.statistics for chunk in chunks if chunk.path_in_schema == field)
        nulls = statistics.null_count if statistics is not None and statistics.has_null_count else None
        if nulls in (0, group.num_rows):
            found += [nulls == 0] * group.num_rows
        else:
            found += _column(_read(path, columns=[field], group=index)).is_valid().to_pylist()
    return found


class _Bytes:
    """The bytes of a row, from the row group that was read last where it is in there."""

    def __init__(self, files: Sequence[Path], starts: Sequence[int], *, field: str) -> None:
        self._files, self._starts, self._field = files, starts, field
        self._group: tuple[int, int, list[Any]] = (0, 0, [])  # rows [begin, end) of the table, and their values

    def __call__(self, row: int) -> bytes | None:
        begin, end, values = self._group
        if not begin <= row < end:
            self._group = begin, end, values = self._read_group(row)
        return values[row - begin].as_py()

    def _read_group(self, row: int) -> tuple[int, int, list[Any]]:
        index = bisect.bisect_right(self._starts, row) - 1
        opened = _open(self._files[index])
        begin = self._starts[index]
        for group in range(opened.num_row_groups):
            end = begin + opened.metadata.row_group(group).num_rows
            if row < end:
                return begin, end, list(_column(_read(self._files[index], columns=[self._field], group=group)))
            begin = end
        raise UserError(f"{self._files[index]} has fewer rows than it had; run the command again")


def _open(path: Path) -> pq.ParquetFile:
    import pyarrow as pa
    import pyarrow.parquet as pq

    check_is_here(path)
    try:
        return pq.ParquetFile(path, page_checksum_verification=True)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} can't be read as Parquet: {_short(error)}") from error


def _read(path: Path, *, columns: list[str], group: int | None = None) -> pa.Table:
    """Columns of a file, or of one of its row groups."""
    import pyarrow as pa

    opened = _open(path)
    try:
        return opened.read(columns) if group is None else opened.read_row_group(group, columns)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} is damaged: {_short(error)}") from error


def _column(table: pa.Table) -> Any:
    """The only column of a table; the only field where it holds structs."""
    import pyarrow.compute as pc
    import pyarrow.types as types

    column = table.column(0)
    return pc.struct_field(column, [0]) if types.is_struct(column.type) else column


def _flat(table: pa.Table) -> list[Any]:
    return _column(table).to_pylist()


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
