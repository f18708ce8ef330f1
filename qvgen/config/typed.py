"""From a plain dict to a frozen dataclass, with the type of every value checked.

Strict: no unknown key, no missing key, no conversion but these: an int where a float is asked for, a scalar where a
tuple is asked for, a list to a tuple, a string to a Path, and whatever `Bits.parse` and `Prompts.parse` read.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

from qvgen.config.bits import Bits
from qvgen.config.prompts.prompt import Prompts
from qvgen.errors import UserError, did_you_mean, unknown_key

T = TypeVar("T")
_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text", Path: "a path"}


def from_plain(kind: type[T], plain: Mapping[str, Any], *, key: str = "") -> T:
    """Build the dataclass ``kind`` from a plain dict, nested dataclasses included.

    Args:
        kind: A dataclass.
        plain: Its fields' values: only dict, list, str, int, float, bool and None inside.
        key: Where ``plain`` stands, for messages: ``""`` or for example ``"phi"``.

    Raises:
        UserError: An unknown or missing key, a value of another type, or one that the dataclass refuses.
    """
    if not isinstance(plain, Mapping):
        shown = "null" if plain is None else plain
        raise UserError(f"{key}={shown} is a section; set one of its keys, for example {key}.{_first_field(kind)}=...")
    hints = typing.get_type_hints(kind)
    for name in plain:
        if name not in hints:
            raise unknown_key(_join(key, name), [_join(key, other) for other in hints])
    for name in hints:
        if name not in plain:
            raise UserError(f"{_join(key, name)} is missing; write {_join(key, name)}=...")
    values = {name: _convert(hint, plain[name], key=_join(key, name)) for name, hint in hints.items()}
    return kind(**values)


def _join(key: str, name: object) -> str:
    return f"{key}.{name}" if key else str(name)


def _first_field(kind: type) -> str:
    return dataclasses.fields(kind)[0].name


def _convert(hint: Any, value: Any, *, key: str) -> Any:
    """One value as its annotation asks for it; see :func:`from_plain`."""
    if hint is Any:
        return value
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        inner = [argument for argument in arguments if argument is not type(None)]
        if len(inner) == 1:
            return _convert(inner[0], value, key=key)
        if type(value) in inner:  # True is an int, too
            return value
        names = " or ".join(_NAMES[kind] for kind in inner)
        raise UserError(f"{key}={'null' if value is None else value} is not {names}; give {names}")
    if origin is Literal:
        if not any(value == choice and type(value) is type(choice) for choice in arguments):  # 1 == True
            choices = [str(choice).lower() if isinstance(choice, bool) else str(choice) for choice in arguments]
            hint = did_you_mean(str(value), choices)
            raise UserError(f"{key}={value} is unknown{hint} (there are: {', '.join(choices)})")
        return value
    if origin is dict and isinstance(value, dict):
        return value
    if origin is tuple:
        return _convert_tuple(arguments, value, key=key)
    if hint is Bits:
        return Bits.parse(value)
    if hint is Prompts:
        return Prompts.parse(value, key=key)
    if dataclasses.is_dataclass(hint):
        kind = typing.cast(type, hint)
        return value if isinstance(value, kind) else from_plain(kind, value, key=key)
    return _convert_scalar(hint, value, key=key)


def _convert_tuple(arguments: tuple[Any, ...], value: Any, *, key: str) -> tuple[Any, ...]:
    items = list(value) if isinstance(value, list | tuple) else [value]
    if arguments[-1] is Ellipsis:
        arguments = (arguments[0],) * len(items)
    if len(items) != len(arguments):
        raise UserError(f"{key}={value} has {len(items)} entries; give {len(arguments)}")
    return tuple(_convert(hint, item, key=key) for hint, item in zip(arguments, items, strict=True))


def _convert_scalar(hint: type, value: Any, *, key: str) -> Any:
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is Path and isinstance(value, str) and value:
        return Path(value)
    if hint is str and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)  # a caption or a name may look like a number
    if isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        if isinstance(value, float) and value != value:
            raise UserError(f"{key}=nan is not a number; give a finite one")
        return value
    shown = "null" if value is None else value
    raise UserError(f"{key}={shown} is not {_NAMES[hint]}; give {_NAMES[hint]}")
