"""Which reader a path needs: told by a file's ending, or by what a folder holds.

    a file     .csv .tsv | .json .jsonl | .parquet | .tar | .toml (musubi-tuner) | videos.txt (with prompts.txt)
    a folder   1. what save_to_disk wrote
               2. metadata.csv, .tsv, .jsonl, .json or .parquet; in its subfolder train where it has none itself
               3. one of: prompts.txt with videos.txt | videos2caption.json or another table with columns of videos and
                  captions | shards of Parquet or tar files, in it, in data or in train | videos with .txt files beside

More than one of a kind is refused with the keys that choose.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from qvgen.data.tables import (
    csv_table,
    json_table,
    musubi,
    parquet_table,
    saved_table,
    text_lists,
    text_pairs,
    webdataset,
)
from qvgen.data.tables.columns import Columns, have_columns
from qvgen.data.tables.rows import Rows, first_few
from qvgen.errors import UserError

METADATA_FILES = ("metadata.csv", "metadata.tsv", "metadata.jsonl", "metadata.json", "metadata.parquet")

_TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".json")
_SHARD_FOLDERS = ("", "data", "train", "data/train", "default/train")
_SPLIT = re.compile(r"^(train|training|validation|valid|val|dev|test|testing|eval)(?=[-_.]|$)", re.IGNORECASE)
_NUMBERED = re.compile(r"-(\d{5})-of-(\d{5})\b")


def read_rows(path: Path, *, wished: Columns) -> Rows:
    """Read a table in whatever form it is.

    Raises:
        UserError: It is in none, or in more than one; or its reader refuses it.
    """
    return _read_folder(path, wished=wished) if path.is_dir() else _read_file(path, wished=wished)


def _read_file(path: Path, *, wished: Columns) -> Rows:
    suffix = path.suffix.lower()
    if suffix in (".csv", ".tsv"):
        return csv_table.read(path, wished=wished)
    if suffix in (".json", ".jsonl", ".ndjson"):
        return json_table.read(path, wished=wished)
    if suffix == ".parquet":
        return parquet_table.read([path], folder=path.parent, wished=wished)
    if suffix == ".tar":
        return webdataset.read([path], wished=wished)
    if suffix == ".toml":
        return musubi.read(path, wished=wished)
    if path.name in (*text_lists.NAME_FILES, *text_lists.CAPTION_FILES):
        return text_lists.read(path.parent, wished=wished)
    if path.name.lower().endswith((".gz", ".tgz", ".zip", ".zst", ".bz2", ".xz")):
        raise UserError(f"{path} is compressed; unpack it and give what is in it")
    raise UserError(
        f"{path} is no table; give a .csv, .tsv, .jsonl, .json, .parquet, .tar or .toml file, or a folder with one"
    )


def _read_folder(folder: Path, *, wished: Columns) -> Rows:
    if any((folder / name).is_file() for name in saved_table.MARKS):
        return saved_table.read(folder, wished=wished)
    for place in (folder, folder / "train"):
        found = [place / name for name in METADATA_FILES if (place / name).is_file()]
        if len(found) > 1:
            names = ", ".join(path.name for path in found)
            raise UserError(f"{place} has {len(found)} metadata files ({names}); write data.path={found[0]} or another")
        if found:
            return _read_file(found[0], wished=wished)
    forms = _forms(folder, wished=wished)
    if len(forms) > 1:
        raise UserError(
            f"{folder} holds clips in {len(forms)} forms ({'; '.join(forms)}); write data.path= for the file of one, "
            "or move the others away"
        )
    for read in forms.values():
        return read()
    raise UserError(_nothing(folder))


def _forms(folder: Path, *, wished: Columns) -> dict[str, Callable[[], Rows]]:
    """The forms that a folder without metadata may have: name of the form -> its reader."""
    forms: dict[str, Callable[[], Rows]] = {}
    wished_files = [folder / name for name in (wished.video, wished.caption) if name and name.endswith(".txt")]
    if text_lists.are_in(folder) or (wished_files and all(path.is_file() for path in wished_files)):
        forms["videos.txt with prompts.txt"] = lambda: text_lists.read(folder, wished=wished)
    tables = sorted(path for path in folder.iterdir() if path.suffix.lower() in _TABLE_SUFFIXES and path.is_file())
    fitting = [path for path in tables if _fits(path, wished=wished)]
    for path in fitting:
        forms[path.name] = lambda path=path: _read_file(path, wished=wished)
    for suffix in (".parquet", ".tar"):
        shards = _shards(folder, suffix=suffix)
        if shards:
            forms[f"{len(shards)} {suffix} files"] = lambda shards=shards: _read_shards(shards, folder, wished=wished)
    if not forms and text_pairs.are_in(folder):
        forms["videos with .txt files beside"] = lambda: text_pairs.read(folder, wished=wished)
    if not forms and len(tables) == 1 and tables[0].suffix.lower() != ".json":
        forms[tables[0].name] = lambda: _read_file(tables[0], wished=wished)  # which will say what it lacks
    return forms


def _fits(path: Path, *, wished: Columns) -> bool:
    """Whether a table's columns are those of clips; what can't be read fits nothing."""
    try:
        names = (
            csv_table.read_header(path, wished=wished)
            if path.suffix.lower() in (".csv", ".tsv")
            else json_table.read_keys(path)
        )
    except UserError:
        return False
    return have_columns(names, wished=wished)


def _shards(folder: Path, *, suffix: str) -> list[Path]:
    """The shards of the split ``train``; all there are, where their names tell no split.

    Raises:
        UserError: There are splits, but none is called train.
    """
    for place in _SHARD_FOLDERS:
        found = sorted(path for path in (folder / place).glob(f"*{suffix}") if path.is_file())
        if not found:
            continue
        splits = {path: match.group(1).lower() for path in found if (match := _SPLIT.match(path.name))}
        if not splits:
            return found
        train = [path for path, split in splits.items() if split in ("train", "training")]
        if not train:
            raise UserError(
                f"{folder / place} has no split train ({first_few([p.name for p in found])}); give one file"
            )
        return train
    return []


def _read_shards(shards: Sequence[Path], folder: Path, *, wished: Columns) -> Rows:
    """All shards as one table; says which of those that their names count are not there."""
    if shards[0].suffix.lower() == ".tar":
        rows = webdataset.read(shards, wished=wished)
    else:
        rows = parquet_table.read(shards, folder=folder, wished=wished)
    matches = [match for path in shards if (match := _NUMBERED.search(path.name))]
    there, counted = {match.group(1) for match in matches}, max((int(match.group(2)) for match in matches), default=0)
    if len(there) < counted:
        rows = replace(rows, notes=(*rows.notes, f"{counted - len(there)} of {counted} shards are not there"))
    return rows


def _nothing(folder: Path) -> str:
    """Why a folder is no table."""
    videos = [path.name for path in folder.iterdir() if path.suffix.lower() in text_pairs.VIDEO_SUFFIXES]
    found = f"{len(videos)} videos ({first_few(sorted(videos))}) and " if videos else ""
    return (
        f"{folder} has {found}no captions that are known; write metadata.csv with the columns file_name, text, "
        "or a .txt file of the same name beside each video"
    )
