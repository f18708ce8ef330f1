"""CSV and TSV, every field as it is written: "001" stays "001", "None" stays "None", no column has a type.

The first line names the columns. The separator is the comma, tab, semicolon or bar with which it names a video's and a
caption's (or the one that Excel's ``sep=;`` before it says). Every line must have as many fields: a caption with a comma
and no quotes would otherwise push its words into other columns. Empty fields beyond them, from a comma at a line's end,
say nothing and are left out, as are empty lines and a first line that stands there again.

Double quotes are as RFC 4180 has them; blanks around a field are no part of it.
"""

from __future__ import annotations

import csv
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from qvgen.data.tables.columns import Columns, choose_columns, have_columns
from qvgen.data.tables.rows import Rows, as_name, as_text, shown
from qvgen.data.tables.text_file import open_text
from qvgen.errors import UserError

_SEPARATORS = {",": "comma", "\t": "tab", ";": "semicolon", "|": "bar"}

_LONGEST_FIELD = 2**24
"""Longest field in characters; a longer one means that a closing quotation mark is missing."""


def read(path: Path, *, wished: Columns) -> Rows:
    """Read a CSV or TSV file.

    Raises:
        UserError: It has no columns of videos and captions, or a line has more or fewer fields than the first.
    """
    separator, skipped = _separator(path, wished=wished)
    names: list[str] = []
    captions: list[str] = []
    repeated = 0
    where = f"{path}, line"
    with open_text(path) as file, _long_fields():
        records = _records(file, path=path, separator=separator, skipped=skipped)
        _, header = next(records, (0, []))
        video, caption = choose_columns(header, wished=wished, where=_described(path, header))
        video_index, caption_index = header.index(video), header.index(caption)
        for line, fields in records:
            if fields == header:
                repeated += 1
                continue
            if len(fields) != len(header):
                _check_count(fields, header=header, where=f"{where} {line}", separator=separator)
            names.append(as_name(fields[video_index].strip(), where=where, column=video, number=line))
            captions.append(as_text(fields[caption_index], where=where, column=caption, number=line).strip())
    form = "CSV" if separator == "," else f"{'TSV' if separator == chr(9) else 'CSV'} with {_SEPARATORS[separator]}s"
    return Rows(
        names=names,
        captions=captions,
        what=f"{form}, columns {video.strip()}, {caption.strip()}",
        folder=path.parent,
        notes=(f"left out are more lines with the columns' names: {repeated}",) if repeated else (),
    )


def read_header(path: Path, *, wished: Columns) -> list[str]:
    """The columns' names; empty for an empty file.

    Raises:
        UserError: It is no text.
    """
    separator, skipped = _separator(path, wished=wished)
    with open_text(path) as file, _long_fields():
        return next(_records(file, path=path, separator=separator, skipped=skipped), (0, []))[1]


def _separator(path: Path, *, wished: Columns) -> tuple[str, int]:
    """The separator, and how many lines stand before the columns' names."""
    with open_text(path) as file:
        first = file.readline(100).strip().strip('"').lower()
    if len(first) == 5 and first.startswith("sep="):
        return first[-1], 1
    headers: dict[str, list[str]] = {}
    for separator in _SEPARATORS:
        with open_text(path) as file, _long_fields():
            try:
                headers[separator] = next(_records(file, path=path, separator=separator, skipped=0), (0, []))[1]
            except UserError:
                if separator == ",":
                    raise
                continue
        if have_columns(headers[separator], wished=wished):
            return separator, 0
    # None has the columns: the message is clearest with the one that finds most.
    return max(headers, key=lambda separator: len(headers[separator])), 0


def _records(file: Iterator[str], *, path: Path, separator: str, skipped: int) -> Iterator[tuple[int, list[str]]]:
    """Line number and fields of every record that is not empty."""
    if len(separator) != 1 or separator in '\r\n"':
        raise UserError(f"{path} says sep={separator}, which separates nothing; use a comma")
    reader = csv.reader(itertools.islice(file, skipped, None), delimiter=separator, strict=True, skipinitialspace=True)
    while True:
        line = skipped + reader.line_num + 1
        try:
            fields = next(reader, None)
        except csv.Error as error:
            raise UserError(f"{path}, line {line}: {_explained(str(error))}") from error
        if fields is None:
            return
        if len(fields) > 1 or (fields and fields[0].strip()):
            yield line, fields


def _explained(error: str) -> str:
    if "expected after" in error:
        return (
            "a quoted text ends and goes on; put the whole caption in double quotes and write a quotation mark "
            'within it twice: "she says ""hello"""'
        )
    if "unexpected end" in error or "field larger" in error:
        return "a quoted text has no end; write its closing quotation mark"
    return f"{error}; write the line again"


def _check_count(fields: Sequence[str], *, header: Sequence[str], where: str, separator: str) -> None:
    """Raise UserError where a record has fewer fields than columns, or more that say something."""
    if len(fields) > len(header) and not any(field.strip() for field in fields[len(header) :]):
        return
    counted = f"{where}: {len(fields)} field{'s' * (len(fields) != 1)} for {len(header)} columns ({shown(fields)})"
    if len(fields) > len(header):
        raise UserError(
            f"{counted}; put a caption with a {_SEPARATORS.get(separator, 'separator')} in double quotes: "
            f'"a red boat{separator} at sea"'
        )
    raise UserError(f"{counted}; write all of them, and put a caption with a line break in double quotes")


def _described(path: Path, header: Sequence[str]) -> str:
    """The table for a message; one without a first line of names is called so."""
    if any(Path(field.strip()).suffix.lower() in (".mp4", ".mov", ".mkv", ".webm", ".avi") for field in header):
        return f"{path} has no first line that names its columns, such as file_name,text: it"
    return str(path)


@contextmanager
def _long_fields() -> Iterator[None]:
    """Fields may be longer than the 131072 characters that the csv module allows: a column may hold other data."""
    before = csv.field_size_limit(_LONGEST_FIELD)
    try:
        yield
    finally:
        csv.field_size_limit(before)
