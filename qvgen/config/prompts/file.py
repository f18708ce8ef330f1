"""Files of prompts, one to a line: the only reader of them. :mod:`qvgen.config.prompts.prompt` says what they look like."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qvgen.config.prompts.line import KEYS, Prompt, prompt_from_object, shortened
from qvgen.errors import UserError

_OTHER_FORMATS = (".json", ".csv", ".tsv", ".parquet", ".yaml", ".yml", ".xlsx", ".toml")
_BYTE_ORDER_MARKS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}


def named_file(value: Any) -> Path | None:
    """The file that a configuration's value names; None where it is something else.

    Args:
        value: Plain: text, a list, or anything. A word in a list of its own is a caption, one alone a file.
    """
    in_list = isinstance(value, list | tuple) and len(value) == 1
    text = value[0] if in_list else value
    return _expanded(text) if isinstance(text, str) and names_a_file(text, alone=not in_list) else None


def names_a_file(text: str, *, alone: bool = True) -> bool:
    """A path and not a caption: it is there, or ends as such a file does, or is a single word of ASCII letters.

    Args:
        text: A path or a caption.
        alone: It stands alone: then one word is rather a mistyped name.
    """
    try:
        exists = _expanded(text).exists()
    except (OSError, ValueError):  # too long for a name, or a zero byte
        exists = False
    single = alone and text.isascii() and len(text.split()) == 1
    return exists or single or text.lower().endswith((".txt", ".jsonl", *_OTHER_FORMATS))


def read_prompt_file(path: Path, *, key: str) -> tuple[Prompt, ...]:
    """Read a file of prompts; :mod:`qvgen.config.prompts.prompt` says what it looks like.

    Args:
        path: The file.
        key: Whose value its name is, for messages.

    Raises:
        UserError: It can't be read as text, holds no prompt, or a line says what it can't say; with file and line.
    """
    if path.suffix.lower() in _OTHER_FORMATS:
        raise UserError(
            f"{key}={path} can't be read as a text file of prompts: write one caption to a line, or a .jsonl file with lines "
            'like {"prompt": "a cat", "seed": 1}'
        )
    lines = [line.strip() for line in _text(path, key=key).replace("\r\n", "\n").replace("\r", "\n").split("\n")]
    read_line = _json_line if path.suffix.lower() == ".jsonl" else _text_line
    prompts = tuple(
        read_line(line, place=f"{path}:{number}", folder=path.parent) for number, line in enumerate(lines, 1) if line
    )
    if not prompts:
        raise UserError(f"{key}={path} holds no caption; write one to a line")
    return prompts


def _expanded(text: str) -> Path:
    try:
        return Path(text).expanduser()
    except RuntimeError:  # no such user's home: reading it says that there is no such file
        return Path(text)


def _text(path: Path, *, key: str) -> str:
    def refuse(why: str) -> UserError:
        return UserError(
            f"{key}={path} can't be read as a text file ({why}); write a file with one caption to a line, or a list of "
            "captions"
        )

    try:
        content = path.read_bytes()
    except OSError as error:
        raise refuse(error.strerror or str(error)) from error
    if (mark := content[:2]) in _BYTE_ORDER_MARKS:
        name = _BYTE_ORDER_MARKS[mark]
        raise refuse(f"it is {name}; convert it with `iconv -f {name} -t UTF-8 {path.name} > NEW.txt`")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise refuse(f"line {line} is no UTF-8: byte {content[error.start]:#04x}; save it as UTF-8") from error
    if "\0" in text:
        raise refuse(f"line {text[: text.index(chr(0))].count(chr(10)) + 1} holds a zero byte; save it as UTF-8 text")
    return text


def _text_line(line: str, *, place: str, folder: Path) -> Prompt:
    del folder
    if line.startswith('{"') and line.endswith("}"):
        raise UserError(f"{place} looks like JSON; give the file a name that ends in .jsonl")
    return Prompt(caption=line)


def _json_line(line: str, *, place: str, folder: Path) -> Prompt:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        for name in names:
            if names.count(name) > 1:
                raise UserError(f"{place} says {name!r} twice; leave one out")
        return dict(pairs)

    try:
        entry = json.loads(line, object_pairs_hook=unique)
    except UserError:
        raise
    except ValueError as error:  # JSONDecodeError, or a number of thousands of digits
        where = f"{error.msg} at character {error.pos + 1}" if isinstance(error, json.JSONDecodeError) else str(error)
        raise UserError(f"{place} is no JSON ({where}): {shortened(line)}") from error
    except RecursionError as error:
        raise UserError(
            f"{place} is no JSON object with the keys {', '.join(KEYS)}: it is nested too deeply"
        ) from error
    if not isinstance(entry, dict):
        raise UserError(f'{place} is no object: {shortened(line)}; write lines like {{"prompt": "a cat"}}')
    return prompt_from_object(entry, place=place, folder=folder)
