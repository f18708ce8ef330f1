"""Text files in an encoding that is known and not guessed: UTF-8, or what a byte-order mark at their start says.

UTF-8 is checked byte for byte. Other encodings without a mark (latin-1, cp1252, UTF-16) can't be told from each other for
certain; such a file is refused with its line and the command that writes it again.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from qvgen.errors import UserError, one_line

_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16, whose mark is its beginning
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_NO_TEXT = (
    (b"PK\x03\x04", "is a zip or Excel file, not text; save it as CSV UTF-8"),
    (b"\x1f\x8b", "is compressed; unpack it with gunzip"),
    (b"PAR1", "is a Parquet file; call it .parquet"),
    (b"SQLite", "is a database, not text; write its rows as CSV"),
)
GIT_LFS = b"version https://git-lfs"


def check_is_here(path: Path) -> None:
    """Raise UserError for a file that stands for another one: what git leaves where git-lfs was not there."""
    with path.open("rb") as file:
        if file.read(len(GIT_LFS)) == GIT_LFS:
            raise UserError(f"{path} is a pointer of git-lfs and not the file itself; run git lfs pull in its folder")


@contextmanager
def open_text(path: Path) -> Iterator[IO[str]]:
    r"""A text file for as long as the context lasts; its line ends are left as they are (``newline=""``).

    Raises:
        UserError: It is no text in UTF-8 or with a byte-order mark, or it can't be read.
    """
    try:
        check_is_here(path)
        with path.open("rb") as file:
            start = file.read(400)
        for magic, remedy in _NO_TEXT:
            if start.startswith(magic):
                raise UserError(f"{path} {remedy}")
        encoding = next((encoding for mark, encoding in _MARKS if start.startswith(mark)), None)
        if encoding is None and start.count(b"\0") > len(start) // 4:
            order = "le" if start[1:2] == b"\0" else "be"
            raise UserError(
                f"{path} is text in UTF-16, not UTF-8; write it again: iconv -f utf-16{order} -t utf-8 OLD > NEW"
            )
        with path.open(encoding=encoding or "utf-8", newline="") as text:
            yield text
    except UnicodeError as error:
        raise UserError(_not_decoded(path, encoding=encoding)) from error
    except OSError as error:
        raise UserError(f"{path} can't be read: {one_line(error)}") from error


def read_lines(path: Path) -> list[str]:
    r"""The lines of a text file, cut at ``\n``, ``\r\n`` or ``\r`` alone; empty lines at the end are left out.

    Raises:
        UserError: See :func:`open_text`.
    """
    with open_text(path) as file:
        lines = file.read().replace("\r\n", "\n").replace("\r", "\n").split("\n")
    while lines and not lines[-1].strip():
        lines.pop()
    return lines


def _not_decoded(path: Path, *, encoding: str | None) -> str:
    """Which line is not in the encoding, and what to do."""
    if encoding is not None and encoding != "utf-8-sig":
        return f"{path} begins as {encoding.upper()} and does not go on so; write it again as UTF-8"
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                return (
                    f"{path}, line {number}: byte {line[error.start]:#x} is no UTF-8; if the file is in cp1252 or latin-1, "
                    "write it again: iconv -f cp1252 -t utf-8 OLD > NEW"
                )
    return f"{path} is not UTF-8; write it again as UTF-8"
