"""The data set configuration of musubi-tuner (TOML): its videos and captions, and nothing else.

    [general]
    caption_extension = ".txt"
    [[datasets]]
    video_directory = "clips"              # a.mp4 with a.txt
    [[datasets]]
    video_jsonl_file = "more.jsonl"        # {"video_path": ..., "caption": ...}

Several entries of the same videos (musubi-tuner cuts them differently) are read once. Which sizes and frames are trained on
is said by ``data.buckets`` and ``data.fps``: those of the file are left out, as are data sets of images.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qvgen.data.tables import json_table, text_pairs
from qvgen.data.tables.columns import Columns
from qvgen.data.tables.rows import Rows, shown
from qvgen.data.tables.text_file import open_text
from qvgen.errors import UserError, one_line

_LEFT_OUT = ("image_directory", "image_jsonl_file")


def read(path: Path, *, wished: Columns) -> Rows:
    """Read all videos that a configuration names; the rows' names are whole paths.

    Raises:
        UserError: It is no TOML, or names no videos, or a folder or file that is not there.
    """
    content = _parse(path)
    general = content.get("general", {})
    entries = content.get("datasets", [])
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in [*entries, general]):
        raise UserError(f"{path} has no [[datasets]] as musubi-tuner writes them; write one with video_directory")
    names: list[str] = []
    captions: list[str] = []
    notes: list[str] = []
    done: set[Path] = set()
    for number, entry in enumerate(entries, 1):
        if any(key in entry for key in _LEFT_OUT):
            notes.append(f"[[datasets]] {number} holds images and is left out")
            continue
        place, rows = _read_entry(entry, general=general, path=path, number=number, wished=wished)
        if place in done:
            continue
        done.add(place)
        if entry.get("num_repeats", general.get("num_repeats", 1)) != 1:
            notes.append(f"num_repeats of [[datasets]] {number} is left out: each clip stands once")
        assert rows.folder is not None
        base = _base(rows, path)
        names += [os.path.abspath(base / name) if name else "" for name in rows.names]
        captions += rows.captions
        notes += rows.notes
    if not done:
        raise UserError(f"{path} names no videos; write [[datasets]] with video_directory or video_jsonl_file")
    what = f"musubi-tuner's configuration of {len(done)} data set{'s' * (len(done) > 1)}"
    return Rows(names=names, captions=captions, what=what, folder=None, notes=notes)


def _parse(path: Path) -> Mapping[str, Any]:
    with open_text(path) as file:
        text = file.read()
    try:
        return tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise UserError(f"{path} is no TOML: {one_line(error)}") from error


def _read_entry(
    entry: Mapping[str, Any], *, general: Mapping[str, Any], path: Path, number: int, wished: Columns
) -> tuple[Path, Rows]:
    """The place and the rows of one data set."""
    found = {key: entry[key] for key in ("video_directory", "video_jsonl_file") if key in entry}
    where = f"{path}, [[datasets]] {number}"
    if len(found) != 1:
        raise UserError(f"{where} must have one of video_directory and video_jsonl_file")
    ((key, value),) = found.items()
    suffix = entry.get("caption_extension", general.get("caption_extension", ".txt"))
    if not isinstance(value, str) or not isinstance(suffix, str):
        raise UserError(f"{where}: {key}={shown(value)} and caption_extension={shown(suffix)} must be text")
    if not suffix or set("/\0") & set(suffix):
        raise UserError(f"{where}: caption_extension={shown(suffix)} ends no file's name; write .txt")
    place = path.parent / os.path.expanduser(value)
    if not os.path.exists(place) and os.path.exists(value):
        place = Path(value).absolute()  # musubi-tuner takes them from where it is started
    if not (os.path.isdir(place) if key == "video_directory" else os.path.isfile(place)):
        raise UserError(f"{where}: {key}={value} does not exist; write the place where it is")
    if key == "video_directory":
        return place, text_pairs.read(place, wished=wished, suffix=suffix)
    return place, json_table.read(place, wished=wished)


def _base(rows: Rows, path: Path) -> Path:
    """The folder that a data set's names start from: its own, or the working folder if its first file is there."""
    assert rows.folder is not None
    first = next((name for name in rows.names if name), "")
    bases = (rows.folder, path.parent, Path.cwd())
    return next((base for base in bases if first and os.path.isfile(base / first)), rows.folder)
