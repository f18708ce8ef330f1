"""Videos with a text file of the same name beside each: a.mp4 and a.txt, as musubi-tuner, finetrainers and others have them.

The whole text file is the caption. CogVideo's own form, ``videos/1.mp4`` with ``labels/1.txt``, is read as well.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from qvgen.data.tables.columns import Columns
from qvgen.data.tables.rows import Rows, as_text, first_few
from qvgen.data.tables.text_file import open_text

VIDEO_SUFFIXES = frozenset(
    (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".mpg", ".mpeg", ".ts", ".flv", ".wmv", ".gif", ".webp")
)


def are_in(folder: Path, *, suffix: str = ".txt") -> bool:
    """Whether a folder, or one within it, has a video with a text file of the same name."""
    return any(text.is_file() for _, text in _pairs(folder, suffix=suffix))


def read(folder: Path, *, wished: Columns, suffix: str = ".txt") -> Rows:
    """Read the captions of all videos of a folder and of those within it, by the order of their names.

    Args:
        folder: Has the videos.
        wished: Must name no column.
        suffix: Suffix of the text files.

    Raises:
        UserError: A text file is not UTF-8.
    """
    wished.refuse_any(path=folder, what=f"a folder of videos with {suffix} files of the same names")
    names: list[str] = []
    captions: list[str] = []
    used: set[Path] = set()
    for video, text in _pairs(folder, suffix=suffix):
        name = video.relative_to(folder).as_posix()
        names.append(as_text(name, where=str(folder), column="a file's name"))
        captions.append(_caption(text) if text.is_file() else "")
        used.add(text)
    lonely = [
        text.relative_to(folder).as_posix()
        for text in _files(folder)
        if text.name.endswith(suffix) and text not in used
    ]
    notes = (f"left out are {suffix} files without a video: {len(lonely)} ({first_few(lonely)})",) if lonely else ()
    return Rows(
        names=names,
        captions=captions,
        what=f"videos with {suffix} files of the same names",
        folder=folder,
        notes=notes,
    )


def _caption(path: Path) -> str:
    with open_text(path) as file:
        text = file.read().replace("\r\n", "\n")
    return as_text(text, where=str(path), column="the caption").strip()


def _pairs(folder: Path, *, suffix: str) -> Iterator[tuple[Path, Path]]:
    """Every video and its text file, which need not be there."""
    for path in _files(folder):
        if path.suffix.lower() in VIDEO_SUFFIXES:
            text = path.with_name(path.stem + suffix)
            label = path.parent.parent / "labels" / text.name
            yield path, label if path.parent.name == "videos" and not text.is_file() and label.is_file() else text


def _files(folder: Path) -> Iterator[Path]:
    """All files of a folder and of those within, linked ones too, by name; hidden ones are left out."""
    seen: set[str] = set()
    for parent, folders, files in os.walk(folder, followlinks=True):
        place = os.path.realpath(parent)
        if place in seen:  # a link to a folder above it
            folders.clear()
            continue
        seen.add(place)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(parent, name) for name in sorted(files) if not name.startswith("."))
