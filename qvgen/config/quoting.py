"""Text on the command line: what the override grammar makes of it, and the exact word that says it.

A command line's word goes through two readers. The shell takes quotation marks away; then `key=value` is read by hydra's
grammar, in which commas separate the values of a sweep, brackets make lists and sections, and many signs can't stand without
quotation marks. So text needs two pairs of them: ``'prompt="a red three, moving left"'``.

Keys whose value is text (:func:`is_text_key`) take what was written where the grammar would read a number or a truth value.
"""

from __future__ import annotations

import re
import shlex
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import is_dataclass
from functools import cache
from pathlib import Path

from qvgen.config.prompts.prompt import Prompts
from qvgen.config.schema.by_verb import SCHEMAS

_CHOICES = ("clips", "kernel", "methods", "names", "profiles", "shapes", "target", "trust", "typed")
"""Keys of text that are no free text: several words of them are a sweep or a list."""
_LEAF_TEXTS = ("cache", "lora", "negative_prompt", "path", "prompts", "transformer", "videos", "weights")
"""Arguments of models and data whose values are text; their classes are not imported to look at a command line."""


def command_word(key: str, value: str | Sequence[str]) -> str:
    r"""The word of a command line that gives a key this text, or this list of texts, whatever is in it.

    >>> print(command_word("prompt", "a red three, moving left"))
    'prompt="a red three, moving left"'
    >>> print(command_word("evaluation.prompts", ["a cat (asleep)", "a dog"]))
    'evaluation.prompts=["a cat (asleep)","a dog"]'
    >>> print(command_word("prompt", "a cat's hat"))
    "prompt=\"a cat's hat\""
    """
    quoted = _quoted(value) if isinstance(value, str) else f"[{','.join(map(_quoted, value))}]"
    word = f"{key}={quoted}"
    if "'" not in word:
        return f"'{word}'"
    if "!" in word:  # bash replaces it between double quotation marks too
        return shlex.quote(word)
    return '"' + re.sub(r'([\\"$`])', r"\\\1", word) + '"'


def suggested_word(key: str, written: str) -> str:
    """The word that was probably meant by ``key=written``, which the grammar can't read or reads as something else."""
    if written.startswith("[") and written.endswith("]") and not set("[]") & set(written[1:-1]):
        return command_word(key, [_unquoted(part.strip()) for part in written[1:-1].split(",")])
    return command_word(key, _unquoted(written))


def is_text_key(key: str) -> bool:
    """Whether a key's value is text, or a list of texts."""
    return key in _text_keys() or _is_leaf_text(key)


def is_single_text_key(key: str) -> bool:
    """Whether a key's value is one text and no list."""
    return _text_keys().get(key, False) or key == "model.negative_prompt"


def takes_objects(key: str) -> bool:
    """Whether a key's value may be an object, as a line of a prompt file is one."""
    return key.rpartition(".")[2] == "prompts"


def _is_leaf_text(key: str) -> bool:
    section, _, name = key.partition(".")
    return section in ("model", "data") and name in _LEAF_TEXTS


def _quoted(text: str) -> str:
    """Between the grammar's quotation marks; nothing in it is an interpolation."""
    text = re.sub(r"(\\*)\$\{", lambda match: match[1] * 2 + "\\${", text)
    text = re.sub(r'(\\*)"', lambda match: match[1] * 2 + '\\"', text)
    ending = re.search(r"\\*$", text)
    return f'"{text}{ending[0] if ending else ""}"'


def _unquoted(text: str) -> str:
    """Without the quotation marks around all of it."""
    inside = text[1:-1]
    return inside if len(text) > 1 and text[0] == text[-1] in "'\"" and text[0] not in inside else text


@cache
def _text_keys() -> dict[str, bool]:
    """Dotted keys of the verbs whose values are text -> whether all verbs that have it take one text alone.

    A key that is text for one verb and a number for another is none: a word is read before its verb is known.
    """
    keys: dict[str, bool] = {}
    numbers: set[str] = set()
    for schema in dict.fromkeys(SCHEMAS.values()):
        for key, single in _texts(schema, ""):
            if key not in _CHOICES and not key.startswith(("run.", "names.")):
                keys[key] = keys.get(key, True) and single
        numbers |= {name for name, hint in typing.get_type_hints(schema).items() if hint in (int, float)}
    return {key: single for key, single in keys.items() if key not in numbers}


def _texts(kind: type, prefix: str) -> Iterator[tuple[str, bool]]:
    for name, hint in typing.get_type_hints(kind).items():
        options = [hint]
        if typing.get_origin(hint) in (typing.Union, types.UnionType):
            options = [option for option in typing.get_args(hint) if option is not type(None)]
        option = options[0]
        key = f"{prefix}{name}"
        if option in (str, Path):
            yield key, True
        elif option is Prompts or (typing.get_origin(option) is tuple and typing.get_args(option)[0] in (str, Path)):
            yield key, False
        elif is_dataclass(option) and isinstance(option, type):
            yield from _texts(option, f"{key}.")
