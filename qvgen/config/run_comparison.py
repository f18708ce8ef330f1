"""Whether a folder holds the very run that a command describes: what of two configurations may differ, and what may not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qvgen.config.run_config import CONFIG_FILE, read_config
from qvgen.config.schema.may_differ import MayDiffer, keys_with, marks_of
from qvgen.errors import UserError


def check_content(
    path: Path, plain: dict[str, Any], *, resume: bool, force: bool
) -> tuple[bool, tuple[str, ...], dict[str, tuple[str, str]]]:
    """Whether the folder holds this very run, keys that only one configuration has, and another world; raises UserError."""
    if not (path / CONFIG_FILE).exists():
        others = sorted(entry.name for entry in path.iterdir() if not entry.name.startswith("."))
        if others:
            raise UserError(f"run_dir={path} is not empty ({others[0]}) and holds no run; choose another")
        return False, (), {}
    marks = marks_of(plain)
    free = frozenset(key for key, mark in marks.items() if mark is MayDiffer.FREE)
    found = list(_differences(read_config(path), plain, free=free))
    world = {key: values for key, values, is_new in found if marks.get(key) is MayDiffer.WORLD and not is_new}
    if world.keys() & {"devices", "num_nodes", "strategy.context_parallel"}:
        following = (entry for entry in found if marks.get(entry[0]) is MayDiffer.FOLLOWING)
        world |= {key: values for key, values, is_new in following if not is_new}
    further = [(key, values, is_new) for key, values, is_new in found if key not in world]
    refused = [(key, values) for key, values, is_new in further if not (force and is_new)]
    if refused:
        texts = [f"{key} is {there} there and {here} here" for key, (there, here) in refused]
        shown = "; ".join(texts[:4]) + (f"; and {len(texts) - 4} more" if len(texts) > 4 else "")
        remedy = "choose another run_dir"
        if all(is_new for _, _, is_new in further):
            remedy += "; if it began with another version of qvgen write resume=force"
        raise UserError(f"run_dir={path} holds another configuration's run: {shown}; {remedy}")
    if not resume:
        raise UserError(f"run_dir={path} holds this very run; continue it with resume=true or choose another run_dir")
    return True, tuple(key for key, _, _ in further), world


def _differences(
    there: Any, asked: Any, key: str = "", *, free: frozenset[str], is_new: bool = False
) -> Iterator[tuple[str, tuple[str, str], bool]]:
    """Key, values there and here, and whether one side lacks it, of every value that differs; no free keys."""
    if key in free or there == asked:
        return
    if isinstance(there, dict) and isinstance(asked, dict):
        for name in sorted(there.keys() | asked.keys(), key=str):
            both = name in there and name in asked
            below = f"{key}.{name}" if key else str(name)
            yield from _differences(there.get(name), asked.get(name), below, free=free, is_new=not both)
    else:
        yield key, (_shown(there), _shown(asked)), is_new


def lasting(plain: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a configuration that stays for as long as a run lasts: all but the keys that are ``MayDiffer.FREE``."""
    free = keys_with(MayDiffer.FREE, plain)

    def kept(value: Any, key: str) -> Any:
        if not isinstance(value, dict):
            return value
        names = {name: f"{key}.{name}" if key else name for name in value}
        return {name: kept(value[name], full) for name, full in names.items() if full not in free}

    result: dict[str, Any] = kept(as_plain(plain), "")
    return result


def _shown(value: object) -> str:
    return "null" if value is None else str(value)


def as_plain(value: Any) -> Any:
    """Mappings as dicts, tuples as lists, paths as text, all the way down."""
    if isinstance(value, Mapping):
        return {str(name): as_plain(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [as_plain(entry) for entry in value]
    return str(value) if isinstance(value, Path) else value
