"""One word of the command line as hydra's grammar reads it; what is wrong with it is told by what to write instead."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from qvgen.config.quoting import command_word, is_single_text_key, is_text_key, suggested_word, takes_objects
from qvgen.errors import UserError


def parse_override(text: str, *, before: Sequence[str] = (), after: Sequence[str] = ()) -> Override:
    """Read one override.

    Args:
        text: `key=value`.
        before: The words of the command line in front of it.
        after: It and the words behind it.
    """
    try:
        return _read_override(text)
    except HydraException as error:
        key, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"cannot read {text!r}; write key=value{_split_hint(before, after)}") from error
        try:
            _read_override(f"{key}=1")
        except HydraException:
            raise UserError(f"cannot read {text!r}: {key!r} is no key; write key=value") from error
        raise UserError(f"cannot read {text!r}; for this text write {suggested_word(key, value)}") from error


@functools.lru_cache(maxsize=4096)
def _read_override(text: str) -> Override:
    """Read a text by hydra's grammar, which is slow; a word of the command line is read more than once."""
    return OverridesParser.create().parse_override(text)


def _split_hint(before: Sequence[str], after: Sequence[str]) -> str:
    """A hint at what to write where a shell has cut a text into words."""
    if not before or "=" not in before[-1]:
        return ""
    words = list(itertools.takewhile(lambda word: "=" not in word, after))
    key, _, value = before[-1].partition("=")
    return f"; if it belongs to {key}, write {suggested_word(key, ' '.join([value, *words]))}"


def as_one_text(override: Override) -> str:
    """The word that gives the whole of a sweep's text to its key, where it may have been meant so; else nothing."""
    key, _, value = str(override.input_line).partition("=")
    meant = "],[" not in value and (" " in value or is_text_key(override.key_or_group))
    return suggested_word(key, value) if meant else ""


def as_written(override: Override) -> str:
    """An override as it is composed: a key of text gets what was written and not the number that it looks like.

    Raises:
        UserError: It was read as a list or a section where one text is needed.
    """
    line, key = str(override.input_line), override.key_or_group
    if override.is_delete() or override.is_sweep_override() or not is_text_key(key):
        return line
    name, _, written = line.partition("=")
    value = override.value()
    if isinstance(value, bool | int | float):
        return f'{name}="{written.strip()}"'
    if (isinstance(value, list) and is_single_text_key(key)) or (isinstance(value, dict) and not takes_objects(key)):
        what = "a list" if isinstance(value, list) else "a section"
        raise UserError(f"{line} is read as {what}; for this text write {command_word(name, written)}")
    return line
