"""The table of clips: which video files there are and what their captions say.

    data.path --qvgen.data.tables--> Rows --where the files are--> ClipTable of Clip

What forms a table can have is said in :mod:`qvgen.data.tables.recognize`; all of them are read as names and texts, as they
are written, and no video is opened. Names are relative to ``videos``; or to the table's folder, its subfolder ``videos``
or the place where the command is started, whichever comes first that has one of the first videos.

Left out: tables on the hub, other audio-visual columns.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import overload

from qvgen.data.tables.columns import Columns
from qvgen.data.tables.recognize import read_rows
from qvgen.data.tables.rows import Member, Rows, first_few
from qvgen.errors import UserError

log = logging.getLogger(__name__)

_LOOKED_AT = 100
"""Rows whose files must not all be missing; looking at a million files would take minutes."""

_ANY_SUFFIX = re.compile(r"\.[A-Za-z0-9]{1,8}")


@dataclass(frozen=True, kw_only=True)
class Clip:
    """One row of a table.

    Attributes:
        name: The file's name as the table has it; names the clip in reports.
        path: The file; None where the table holds the bytes themselves.
        data: The file's bytes, where the table holds them in a column; or None.
        member: The place of the bytes, where the table is made of archives; or None.
        caption: Text of the clip; empty where the table has no text.
    """

    name: str
    path: Path | None
    data: bytes | None
    caption: str
    member: Member | None = None

    def state(self) -> tuple[int | str | None, ...]:
        """All that tells whether the clip's bytes are the same as before, without reading a file: its size and times.

        Of bytes in a table it is their checksum, of an archive's member its place.
        """
        if self.data is not None:
            return (hashlib.sha256(self.data).hexdigest(),)
        if self.member is not None:
            return ("member", *self.member.state())
        return _file_state(str(self.path))

    @contextmanager
    def local_file(self) -> Iterator[Path]:
        """A path to the clip's bytes, for as long as the context lasts.

        Bytes of a table go to a temporary file whose name is ours: only the ending is the clip's.

        Raises:
            OSError: They can't be written.
        """
        if self.path is not None:
            yield self.path
            return
        data = self.data if self.member is None else self.member.read()
        assert data is not None, "a clip has a path or bytes"
        suffix = Path(self.name).suffix
        with tempfile.NamedTemporaryFile(suffix=suffix if _ANY_SUFFIX.fullmatch(suffix) else "") as file:
            file.write(data)
            file.flush()
            yield Path(file.name)


class ClipTable(Sequence[Clip]):
    """The rows of a table, in its order.

    Args:
        rows: The rows that its reader gave.
        folder: Folder that relative names start from.

    Attributes:
        folder: The same folder, as it was given.
        what: The form that was recognized, in one phrase.
        lost: Rows that can't be used or were left out by the reader, one phrase for each kind.
    """

    def __init__(self, rows: Rows, *, folder: Path) -> None:
        self._rows = rows
        self.folder = folder
        self.what = rows.what
        self.lost = (*rows.notes, *_faults(rows))

    def __len__(self) -> int:
        """Number of clips."""
        return len(self._rows.names)

    @overload
    def __getitem__(self, index: int) -> Clip: ...
    @overload
    def __getitem__(self, index: slice) -> list[Clip]: ...
    def __getitem__(self, index: int | slice) -> Clip | list[Clip]:
        """Row ``index``; no video is opened.

        Raises:
            IndexError: There is no such row.
            UserError: The table's own bytes can't be read any more.
        """
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        rows, row = self._rows, range(len(self))[index]
        name, caption = rows.names[row], rows.captions[row]
        if rows.members:
            return Clip(name=name, path=None, data=None, caption=caption, member=rows.members[row])
        data = None if rows.read_bytes is None else rows.read_bytes(row)
        if data is not None:
            return Clip(name=name or f"row-{row}", path=None, data=data, caption=caption)
        name = _shown(name, row)
        return Clip(name=name, path=self.folder / name, data=None, caption=caption)

    def states(self) -> list[tuple[int | str | None, ...]]:
        """Name, caption and :meth:`Clip.state` of all rows."""
        if self._rows.members or self._rows.read_bytes is not None:
            return [(clip.name, clip.caption, *clip.state()) for clip in self]
        start = f"{self.folder}/"  # joining paths for each row would take most of the time
        names = map(_shown, self._rows.names, range(len(self)))
        rows = zip(names, self._rows.captions, strict=True)
        return [(name, text, *_file_state(name if name[0] == "/" else start + name)) for name, text in rows]

    def missing(self) -> list[str]:
        """The names of the files that are not there; a folder is listed once, no file is opened.

        Bytes that a table holds itself are there.
        """
        if self._rows.members:
            return []
        there: dict[str, set[str]] = {}
        missing = []
        held = self._rows.holds_bytes or [False] * len(self)
        for name in (name for name, holds in zip(self._rows.names, held, strict=True) if not holds):
            parent, file = os.path.split(os.path.join(self.folder, name))
            if parent not in there:
                there[parent] = _files(parent)
            # a name that the listing lacks may be there in another spelling, where the file system allows that
            if not name or (file not in there[parent] and not os.path.isfile(os.path.join(parent, file))):
                missing.append(name or "(a row without a name)")
        return missing

    def summary(self) -> list[str]:
        """The table's form, and what is missing of it, one line each."""
        missing = self.missing()
        lines = [f"table: {self.what}, {len(self)} rows"]
        if not self._rows.holds_all:
            absent = f"missing: {len(missing)} ({first_few(missing)})" if missing else "all are there"
            lines.append(f"video files: in {self.folder}; {absent}")
        return [*lines, *(f"note: {phrase}" for phrase in self.lost)]


def _shown(name: str, row: int) -> str:
    """The name of a row; one without a name has no file either."""
    return name or f"(row {row} without a name)"


def _file_state(path: str) -> tuple[int | None, ...]:
    """Size and times of a file, (None,) where there is none; no program sets the last of them."""
    try:
        state = os.stat(path)
    except OSError:
        return (None,)
    return state.st_size, state.st_mtime_ns, state.st_ctime_ns


def read_table(path: Path | str, *, videos: Path | str | None = None, columns: Columns | None = None) -> ClipTable:
    """Read a table of clips; what was recognized, and what is lost, is logged once.

    Args:
        path: File or folder; see the module's head.
        videos: Folder that relative names start from; None: found as the module's head says.
        columns: The columns that the user names; None: whichever is known.

    Raises:
        UserError: There is no table, it has other columns or no row, or none of its first 100 videos exists.
    """
    path = Path(os.path.expanduser(path))
    if not os.path.exists(path):
        raise UserError(f"data.path={path} does not exist; give a folder of videos with metadata.csv, or a table")
    rows = read_rows(path, wished=columns or Columns())
    if not rows.names:
        raise UserError(f"{path} has no row; give a table with a clip or more")
    if not any(rows.captions):
        raise UserError(f"{path} ({rows.what}) has no caption in any of its {len(rows.captions)} rows; write some")
    if videos is not None:
        videos = Path(os.path.expanduser(videos))
        if rows.folder is None or rows.holds_all:
            what = "holds the bytes of its videos itself" if rows.holds_all else "says itself where its videos are"
            raise UserError(f"data.videos={videos}: {path} {what}; leave the key out")
        if not os.path.isdir(videos):
            raise UserError(f"data.videos={videos} is no folder; give the one that the names in {path} start from")
        rows = replace(rows, folder=videos)
    table = ClipTable(rows, folder=_folder(rows, path=path, given=videos is not None))
    _say(f"{path}: {table.what}, {len(table)} rows{'' if rows.holds_all else f', videos in {table.folder}'}")
    for phrase in table.lost:
        _say(f"{path}: {phrase}", warn=True)
    return table


def _folder(rows: Rows, *, path: Path, given: bool) -> Path:
    """Where the videos are: the first of the known places with one of the first videos."""
    own = path.parent if rows.folder is None else rows.folder
    if rows.holds_all:
        return own
    places = [own] if given or rows.folder is None else [own, own / "videos", Path.cwd()]
    looked_at = range(min(len(rows.names), _LOOKED_AT))
    for place in places:
        if any(rows.names[row] and os.path.isfile(place / rows.names[row]) for row in looked_at):
            return place
    if any(rows.holds_bytes):
        return own
    first = next((name for name in rows.names if name), "(no name)")
    if re.match(r"[a-z0-9]+://", first):
        raise UserError(f"{path} has addresses, such as {first}, and no files; download them and write their names")
    if "\\" in first:
        raise UserError(f"{path} has names with backslashes, such as {first}, and no such files; write / for them")
    raise UserError(
        f"{own / first} and {len(looked_at) - 1} more videos of {path} do not exist; "
        "write data.videos=FOLDER for the folder that their names start from"
    )


def _faults(rows: Rows) -> list[str]:
    """Rows that can't be used or stand there more than once, counted and named."""
    faults = []
    empty = [name for name, caption in zip(rows.names, rows.captions, strict=True) if not caption]
    if empty:
        faults.append(f"rows without a caption: {len(empty)} ({first_few(empty)})")
    if rows.read_bytes is None and not rows.members:
        nameless = sum(not name for name in rows.names)
        if nameless:
            faults.append(f"rows without a file's name: {nameless}")
    often = [name for name, count in Counter(rows.names).items() if name and count > 1]
    if often and rows.read_bytes is None:  # names of clips that the table holds as bytes say nothing
        captions: dict[str, set[str]] = {name: set() for name in often}
        for name, caption in zip(rows.names, rows.captions, strict=True):
            if name in captions:
                captions[name].add(caption)
        differ = sum(len(found) > 1 for found in captions.values())
        faults.append(
            f"files in several rows: {len(often)}, with different captions: {differ} ({first_few(often)}); "
            "each row is trained on"
        )
    return faults


def _files(folder: str) -> set[str]:
    try:
        with os.scandir(folder) as entries:
            return {entry.name for entry in entries if entry.is_file()}
    except OSError:
        return set()


@cache
def _say(line: str, *, warn: bool = False) -> None:
    """Log a line once in a process: a run opens its table several times."""
    log.log(logging.WARNING if warn else logging.INFO, "%s", line)
