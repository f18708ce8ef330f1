"""Plain values as JSON that gives back the very same ones: tuples, keys of every kind, all floats, the order of a dict.

    None, bool, int, str, finite float, list      as JSON has them (a float's shortest text is read as the same float)
    a dict of texts that do not begin with "$"    an object
    any other dict                                {"$dict": [[key, value], ...]}
    tuple, set, infinity, bytes, ...              {"$tuple": [...]}, {"$set": [...]}, {"$float": "inf"}, {"$bytes": "00ff"}
    a tensor                                      {"$tensor": NAME}, whose name says where it stands among the values

Nothing else is taken: reading calls nothing that the text names.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch

from qvgen.errors import UserError

Place = tuple[Any, ...]
"""Keys and numbers that lead to a value, from the outermost on."""

_MARK = "$"


def encode(value: Any, *, tensor: Callable[[str, Any], str | None], place: Place = ()) -> Any:
    """Plain values as what JSON holds.

    Args:
        value: The values.
        tensor: Is called with the name of its place for each value that is nothing plain; returns the name that stands for
            it from here on, or None where it is no tensor either.
        place: Where the values stand.

    Raises:
        UserError: A value is of a kind that is not kept; the message says where it stands.

    Example:
        >>> encode({"rates": (1e-3, float("inf")), "state": {0: [None]}}, tensor=lambda name, value: None)
        {'rates': {'$tuple': [0.001, {'$float': 'inf'}]}, 'state': {'$dict': [[0, [None]]]}}
    """
    kind = type(value)

    def listed(values: Any) -> list[Any]:
        return [encode(entry, tensor=tensor, place=(*place, index)) for index, entry in enumerate(values)]

    if value is None or kind in (bool, int, str):
        return value
    if kind is float:
        return value if math.isfinite(value) else {"$float": repr(value)}
    if kind is list:
        return listed(value)
    if kind is dict or kind is OrderedDict:
        pairs = [(key, encode(entry, tensor=tensor, place=(*place, key))) for key, entry in value.items()]
        if kind is dict and all(type(key) is str and not key.startswith(_MARK) for key, _ in pairs):
            return dict(pairs)
        name = "$dict" if kind is dict else "$ordered"
        return {name: [[encode(key, tensor=_no_tensor, place=place), entry] for key, entry in pairs]}
    for name, made in _SEQUENCES.items():
        if kind is made:
            return {name: listed(value)}
    if kind is complex:
        return {"$complex": listed((value.real, value.imag))}
    if kind is bytes:
        return {"$bytes": value.hex()}
    if kind is torch.dtype:
        return {"$dtype": str(value).removeprefix("torch.")}
    named = tensor(place_name(place), value)
    if named is None:
        raise UserError(
            f"{place_name(place)} is a {kind.__module__}.{kind.__qualname__}, which a checkpoint does not keep; make it a "
            "tensor, or a plain number, text, list or dict"
        )
    return {"$tensor": named}


def decode(value: Any, *, tensor: Callable[[str], Any]) -> Any:
    """What :func:`encode` was given.

    Args:
        value: Its result, from JSON.
        tensor: Gives the tensor of a name.

    Raises:
        ValueError: There is a mark that it does not write; also KeyError, TypeError or AttributeError.

    Example:
        >>> decode({"$dict": [[0, {"$tuple": [1.5]}]]}, tensor=str)
        {0: (1.5,)}
    """

    def each(entries: list[Any]) -> list[Any]:
        return [decode(entry, tensor=tensor) for entry in entries]

    if type(value) is list:
        return each(value)
    if type(value) is not dict:
        return value
    if not any(name.startswith(_MARK) for name in value):
        return {name: decode(entry, tensor=tensor) for name, entry in value.items()}
    ((name, content),) = value.items()
    if name in _SEQUENCES:
        return _SEQUENCES[name](each(content))
    if name in ("$dict", "$ordered"):
        pairs = [(decode(key, tensor=tensor), decode(entry, tensor=tensor)) for key, entry in content]
        return dict(pairs) if name == "$dict" else OrderedDict(pairs)
    if name == "$tensor":
        return tensor(content)
    if name == "$complex":
        return complex(*each(content))
    if name == "$float" and content in ("inf", "-inf", "nan"):
        return float(content)
    if name == "$bytes":
        return bytes.fromhex(content)
    if name == "$dtype" and isinstance(found := getattr(torch, content), torch.dtype):
        return found
    raise ValueError(f"{name} is no mark that is known")


def place_name(place: Place) -> str:
    """A name of a place that no other place has.

    Example:
        >>> place_name(("state_dict", "a.weight")), place_name(("state", 3, "a/b")), place_name(("state", "3"))
        ('state_dict/a.weight', 'state/#3/a~1b', 'state/3')
    """
    return "/".join(_part(key) for key in place)


def _part(key: Any) -> str:
    if type(key) is str:
        escaped = key.replace("~", "~0").replace("/", "~1")
        return f"~2{escaped}" if escaped.startswith("#") else escaped
    return f"#{key!r}".replace("~", "~0").replace("/", "~1")


def _no_tensor(name: str, value: Any) -> None:
    del name, value


_SEQUENCES: dict[str, Callable[[list[Any]], Any]] = {
    "$tuple": tuple,
    "$size": torch.Size,
    "$set": set,
    "$frozenset": frozenset,
}
"""Mark -> the kind of value that it stands for."""
