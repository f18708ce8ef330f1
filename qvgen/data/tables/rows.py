"""The rows that every reader of a table gives: names and captions, as written, and where a table's own bytes lie."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qvgen.errors import UserError

_LONGEST_NAME = 255
"""Bytes that file systems allow between two slashes."""


@dataclass(frozen=True, kw_only=True)
class Member:
    """A file within an archive that is not compressed.

    Attributes:
        archive: The archive's file.
        offset: Where the file's bytes begin.
        size: How many they are.
    """

    archive: Path
    offset: int
    size: int

    def read(self) -> bytes:
        """Read the bytes of the member.

        Raises:
            UserError: The archive is shorter than it was.
        """
        with self.archive.open("rb") as file:
            file.seek(self.offset)
            data = file.read(self.size)
        if len(data) != self.size:
            raise UserError(f"{self.archive} was cut off while it was in use; run the command again")
        return data

    def state(self) -> tuple[int, ...]:
        """Offset, size, and the archive's size and times, which tell whether it is still the same file."""
        state = self.archive.stat()
        return self.offset, self.size, state.st_size, state.st_mtime_ns, state.st_ctime_ns


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The rows of a table, in its order.

    Attributes:
        names: Names of the video files, as written; empty where a row has none.
        captions: Captions as written, without blanks around them; empty where a row has none.
        what: The form that was recognized, such as ``CSV with the columns video, caption``.
        folder: Folder that relative names start from; None where names are whole paths, or those of files within archives.
        read_bytes: Row -> the bytes that the table holds of it, or None; for tables that hold any.
        holds_bytes: Whether there are any, of each row; empty without ``read_bytes``.
        members: Place of each row's bytes, where the table is made of archives.
        notes: Rows and columns that were left out, one phrase each.
    """

    names: Sequence[str]
    captions: Sequence[str]
    what: str
    folder: Path | None
    read_bytes: Callable[[int], bytes | None] | None = None
    holds_bytes: Sequence[bool] = ()
    members: Sequence[Member] = ()
    notes: Sequence[str] = field(default_factory=tuple)

    @property
    def holds_all(self) -> bool:
        """Whether the table holds the bytes of every row itself."""
        return bool(self.members) or (bool(self.holds_bytes) and all(self.holds_bytes))


def as_text(value: Any, *, where: str, column: str, number: int | None = None) -> str:
    """A value of a table that must be text: itself, the one text of a list, or "" for none.

    Args:
        value: The value as the file's own format reads it.
        where: The file, and what ``number`` counts; for the message.
        column: For the message.
        number: Line, row or entry; None: ``where`` says all.

    Raises:
        UserError: A number, a list, or whatever else is no text; or text that can't be written to a file.

    Example:
        >>> as_text(["a red boat"], where="a.json, entry 1", column="cap"), as_text(None, where="", column="cap")
        ('a red boat', '')
    """
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if value is None:
        return ""
    if isinstance(value, str) and "\0" not in value and (value.isascii() or _is_whole(value)):
        return value
    where = _place(where, number)
    if not isinstance(value, str):
        kinds = {bool: "true or false", int: "a number", float: "a number", dict: "an object", bytes: "bytes"}
        kind = f"a list of {len(value)}" if isinstance(value, list) else kinds.get(type(value), type(value).__name__)
        raise UserError(f"{where}: {column} is {kind} ({shown(value)}), not text; write one text in double quotes")
    if "\0" in value:
        raise UserError(f"{where}: {column} holds a NUL byte ({shown(value)}); write the file again without it")
    raise UserError(f"{where}: {column} holds half a character ({shown(value)}); write it again as UTF-8")


def as_name(value: Any, *, where: str, column: str, number: int | None = None) -> str:
    """Read a file's name as :func:`as_text` reads a text.

    Raises:
        UserError: It is no text, or no file system has such a name.
    """
    name = as_text(value, where=where, column=column, number=number)
    long = len(name) * 4 > _LONGEST_NAME and any(len(part.encode()) > _LONGEST_NAME for part in name.split("/"))
    if long or "\n" in name:
        raise UserError(
            f"{_place(where, number)}: {column} is no file's name ({shown(name)}); write data.video_column=NAME for the "
            "column that is"
        )
    return name


def _is_whole(text: str) -> bool:
    """Whether a text has no half of a surrogate pair, as JSON's escapes may leave one."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _place(where: str, number: int | None) -> str:
    return where if number is None else f"{where} {number}"


def shown(value: Any, *, length: int = 60) -> str:
    """A value for a message: on one line, and no longer than it helps."""
    text = repr(value)
    return text if len(text) <= length else f"{text[: length - 3]}..."


def first_few(names: Sequence[str], *, count: int = 3) -> str:
    """Names for a message: ``a, b, c and 4 more``."""
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(shown(name)[1:-1] for name in names[:count]) + more
