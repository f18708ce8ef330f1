"""JSON Lines and JSON: objects with a video's name and its caption, or one object of names and captions.

    .jsonl   {"file_name": "a.mp4", "text": "a red boat"}        one object to a line
    .json    [{"path": "a.mp4", "cap": ["a red boat"]}, ...]     as FastVideo's videos2caption.json
             {"a.mp4": "a red boat", ...}

The forms are told by their content, not by the file's name. Values are taken one by one: what is no text is refused with
its line, and changes no other.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from qvgen.data.tables.columns import Columns, choose_columns
from qvgen.data.tables.rows import Rows, as_name, as_text, shown
from qvgen.data.tables.text_file import open_text
from qvgen.errors import UserError


class _NoJsonError(ValueError):
    """Text that is no JSON; the message says where and why."""


def read(path: Path, *, wished: Columns) -> Rows:
    """Read a JSON or JSON Lines file.

    Raises:
        UserError: It is neither, it has no columns of videos and captions, or one of them holds something else than text.
    """
    with open_text(path) as file:
        if _is_one_value(file, path):
            return _from_value(file.read(), path=path, wished=wished)
        return _from_objects(_lines(file, path), form="JSON Lines", word="line", path=path, wished=wished)


def read_keys(path: Path) -> list[str]:
    """The keys of the first object; empty where there is none."""
    try:
        with open_text(path) as file:
            content = _parse(file.read()) if _is_one_value(file, path) else _parse(file.readline() or "{}")
    except ValueError:
        return []
    first = content[0] if isinstance(content, list) and content else content
    return list(first) if isinstance(first, dict) else []


def _is_one_value(file: IO[str], path: Path) -> bool:
    """Whether the whole file is one JSON value, and not one for each line; leaves the file at its start."""
    first = next((line for line in file if line.strip()), "")
    more = any(line.strip() for line in file)
    file.seek(0)
    if first.lstrip().startswith("["):
        return True
    try:
        _parse(first)
    except _NoJsonError:
        return path.suffix.lower() == ".json"
    return not more and path.suffix.lower() == ".json"


def _lines(file: Iterable[str], path: Path) -> Iterator[tuple[int, Any]]:
    """Line number and value of every line that is not empty."""
    for number, line in enumerate(file, 1):
        if line.strip():
            try:
                yield number, _parse(line)
            except _NoJsonError as error:
                raise UserError(f"{path}, line {number}: {error}; write one JSON object to a line") from error


def _from_value(content: str, *, path: Path, wished: Columns) -> Rows:
    """A file that is one JSON value."""
    try:
        found = _parse(content)
    except _NoJsonError as error:
        raise UserError(f"{path}: {error}; write a list of objects") from error
    if isinstance(found, list):
        return _from_objects(enumerate(found, 1), form="JSON list", word="entry", path=path, wished=wished)
    if isinstance(found, dict) and found and all(map(_is_caption, found.values())):
        if not any(Path(name).suffix for name in found):
            return _from_objects([(1, found)], form="JSON object", word="entry", path=path, wished=wished)
        wished.refuse_any(path=path, what="one object of names and captions")
        where = f"{path}, entry"
        return Rows(
            names=[as_name(name, where=f"{where} {i}", column="name") for i, name in enumerate(found, 1)],
            captions=[
                as_text(v, where=f"{where} {i}", column="caption").strip() for i, v in enumerate(found.values(), 1)
            ],
            what="JSON object of names and captions",
            folder=path.parent,
        )
    raise UserError(
        f"{path} holds {shown(found)}; write a list of objects, one for each clip "
        "(pandas: to_json(orient='records', lines=True) and .jsonl)"
    )


def _is_caption(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and len(value) == 1 and isinstance(value[0], str))


def _from_objects(entries: Iterable[tuple[int, Any]], *, form: str, word: str, path: Path, wished: Columns) -> Rows:
    """Rows of objects, one for each clip; ``word`` is what their numbers count."""
    keys: dict[str, None] = {}
    kept: list[tuple[int, Mapping[str, Any]]] = []
    for number, value in entries:
        if not isinstance(value, dict):
            raise UserError(f"{path}, {word} {number}: {shown(value)} is no JSON object; write {{...}} for each clip")
        keys.update(dict.fromkeys(value))
        kept.append((number, {key: value[key] for key in value if wished.is_of_interest(key)}))
    if not kept:
        raise UserError(f"{path} has no row; give a table with a clip or more")
    video, caption = choose_columns(list(keys), wished=wished, where=path)
    where = f"{path}, {word}"
    names = [as_name(row.get(video), where=where, column=video, number=number) for number, row in kept]
    captions = [as_text(row.get(caption), where=where, column=caption, number=number) for number, row in kept]
    return Rows(
        names=names,
        captions=[text.strip() for text in captions],
        what=f"{form}, columns {video}, {caption}",
        folder=path.parent,
    )


def _parse(text: str) -> Any:
    """A JSON value.

    Raises:
        _NoJsonError: It is none, is nested too deeply, or an object has a key twice.
    """
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError as error:
        place = f" at line {error.lineno}" if error.lineno > 1 else f" at character {error.colno}"
        raise _NoJsonError(f"no JSON ({error.msg}{place})") from error
    except RecursionError as error:
        raise _NoJsonError("no JSON that can be read (nested too deeply)") from error
    except ValueError as error:  # a key twice, or a number of thousands of digits
        raise _NoJsonError(f"no JSON that can be read ({error})") from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object; JSON's own rule, that the last of equal keys is kept, would lose a caption in silence."""
    entries = dict(pairs)
    if len(entries) < len(pairs):
        twice = next(key for i, (key, _) in enumerate(pairs) if key in dict(pairs[:i]))
        raise ValueError(f"the key {twice!r} stands in one object twice")
    return entries


_DECODER = json.JSONDecoder(object_pairs_hook=_once)
