"""JSON that somebody else may have written: plain values of bounded size, or one line that says why not.

Python's own reader takes what no other does (NaN, the last of two equal keys, numbers of any length) and may end in a
RecursionError. What is read here holds only finite numbers of 64 bits, each key once, and is neither large nor deep; the
functions below then ask for one type and range each, so that no value reaches code that was not made for it.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Collection, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, NoReturn

from qvgen.errors import UserError, unknown_key

MAX_BYTES = 16 * 2**20
"""Largest size of a file in bytes; the manifest of a model of 14 billion parameters has half of one million."""
MAX_DEPTH = 32
"""Largest depth of lists and mappings within each other."""
_MAX_WHOLE = 2**63


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        UserError: It is too large, or :func:`parse_json` refuses it.
        OSError: It can't be read.
    """
    return parse_json(read_bytes(path), source=str(path))


def read_bytes(path: Path) -> bytes:
    """The content of a file that is not too large to be parsed; raises UserError or OSError."""
    with path.open("rb") as file:
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise UserError(f"{path} is larger than {MAX_BYTES} bytes, which no such file is")
    return content


def parse_json(content: bytes, *, source: str) -> Any:
    """Parse JSON in UTF-8.

    Args:
        content: The file's bytes.
        source: Its path, for messages.

    Raises:
        UserError: It is no JSON, names a key twice, is nested too deeply, or holds a number that is not finite or not of 64
            bits.

    Example:
        >>> parse_json(b'{"bits": 4, "rotation": 1e999}', source="manifest.json")
        Traceback (most recent call last):
        qvgen.errors.UserError: manifest.json is no JSON (the number 1e999 is not finite)
    """
    try:
        value = json.loads(
            content.decode("utf-8"),
            parse_int=_whole,
            parse_float=_finite,
            parse_constant=_refuse_constant,
            object_pairs_hook=_unique,
        )
    except RecursionError as error:
        raise UserError(f"{source} is no JSON (it is nested more than {MAX_DEPTH} deep)") from error
    except ValueError as error:
        raise UserError(f"{source} is no JSON ({error})") from error
    if _depth(value) > MAX_DEPTH:
        raise UserError(f"{source} is no JSON (it is nested more than {MAX_DEPTH} deep)")
    return value


def whole(value: object, name: str, *, low: int = 0, high: int = _MAX_WHOLE) -> int:
    """The value if it is a whole number from ``low`` to ``high``; raises UserError with its name otherwise."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise UserError(f"{name}={_shown(value)} is no whole number from {low} to {high}")
    return value


def number(value: object, name: str) -> float:
    """The value as a float if it is a finite number; raises UserError with its name otherwise."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
        raise UserError(f"{name}={_shown(value)} is no finite number")
    return float(value)


def flag(value: object, name: str) -> bool:
    """The value if it is true or false; raises UserError with its name otherwise."""
    if not isinstance(value, bool):
        raise UserError(f"{name}={_shown(value)} is neither true nor false")
    return value


def text(value: object, name: str) -> str:
    """The value if it is a text; raises UserError with its name otherwise."""
    if not isinstance(value, str):
        raise UserError(f"{name}={_shown(value)} is no text")
    return value


def items(value: object, name: str) -> list[Any]:
    """The value if it is a list; raises UserError with its name otherwise."""
    if not isinstance(value, list):
        raise UserError(f"{name}={_shown(value)} is no list")
    return value


def mapping(value: object, name: str) -> dict[str, Any]:
    """The value if it is a mapping; raises UserError with its name otherwise."""
    if not isinstance(value, dict):
        raise UserError(f"{name}={_shown(value)} is no mapping")
    return value


def options_of(kind: type, value: Mapping[str, Any], *, name: str, given: Collection[str]) -> dict[str, Any]:
    """The value as arguments of a dataclass; raises UserError for a key that it lacks, or a missing one without a default.

    Args:
        kind: A dataclass.
        value: Its fields' values.
        name: Where they stand, dotted.
        given: Fields that are set elsewhere.
    """
    known = {field.name: field.default for field in fields(kind) if field.name not in given}
    for key in value:
        if key not in known:
            raise unknown_key(f"{name}.{key}", [f"{name}.{other}" for other in known])
    for key, default in known.items():
        if default is MISSING and key not in value:
            raise UserError(f"{name}.{key} is missing; write {name}.{key}=...")
    return dict(value)


def _shown(value: object) -> str:
    """A value as a message shows it, not longer than a line."""
    shown = repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."


def _whole(digits: str) -> int:
    if len(digits) > 20 or abs(int(digits)) > _MAX_WHOLE:
        raise ValueError(f"the number {digits[:20]}{'...' if len(digits) > 20 else ''} is longer than 64 bits")
    return int(digits)


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"the number {digits[:20]} is not finite")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {_shown(twice)} is there twice")
    return entries


def _depth(value: Any) -> int:
    """How deeply lists and mappings are nested; counted level by level, without recursion."""
    depth, level = 0, [value]
    while level := [entry for entry in level if isinstance(entry, list | dict)]:
        depth += 1
        if depth > MAX_DEPTH:
            break
        level = [child for entry in level for child in (entry.values() if isinstance(entry, dict) else entry)]
    return depth
