"""Keys of records: plain values that say all a record depends on, whose text is its key. Equal keys, equal records.

Whatever can't be written down so, a user's own class for example, has no key; then nothing is looked up and nothing is kept.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from qvgen.errors import OWN_PACKAGES
from qvgen.quant.grid import Grid
from qvgen.training.source_checksum import sources_checksum

_NOT_COUNTED = {Grid: ("bits",)}
"""Fields that change no operator, shape or type: of how many values a grid has, only the values of tensors depend."""

_MAX_SETTINGS = 256 * 2**10
"""Largest file in bytes that is a folder's configuration; vocabularies of tokenizers are larger, and no plan reads them."""


class NoKeyError(TypeError):
    """A value can't be part of a key."""


def key_text(value: Any) -> str:
    """The key of plain values and of frozen settings of qvgen's own, and of the versions of what builds models from them.

    Raises:
        NoKeyError: Something in it is of another kind.
    """
    return json.dumps({"of": _plain(value), "versions": _versions()}, sort_keys=True, separators=(",", ":"))


def key_hash(text: str) -> str:
    """A key's name: 64 hex digits."""
    return hashlib.sha256(text.encode()).hexdigest()


@cache
def own_sources() -> str:
    """Checksum of qvgen's sources, 64 hex digits: what it recorded before it was edited counts no more."""
    package = Path(__file__).resolve().parents[2]
    return sources_checksum({"qvgen": package})


def family_key(family: Any, section: Mapping[str, Any]) -> dict[str, Any]:
    """All that a model family's classes make their answers from, weights aside.

    Args:
        family: The family.
        section: Its section of the configuration.

    Raises:
        NoKeyError: The family is no class of qvgen's, or its transformer is a finetune of its own.
    """
    _check_own(type(family))
    if getattr(family, "transformer", None) is not None:
        raise NoKeyError("a finetune, whose files say what it is")
    folder = getattr(getattr(family, "folder", None), "path", None)
    arguments = {key: value for key, value in section.items() if key not in ("recipe", "path")}
    if getattr(family, "folder", None) is not None and folder is None:
        raise NoKeyError("a folder without a place")
    return {"arguments": arguments, "config": family.transformer_config, "folder": _settings(folder)}


def frame_key(family: Any) -> dict[str, Any]:
    """All that the modules and tensors of a transformer follow from.

    Raises:
        NoKeyError: The family is no class of qvgen's, which may build something else from the same configuration.
    """
    _check_own(type(family))
    if getattr(family, "lora", None):
        raise NoKeyError("LoRAs, which are held to the model itself")
    name = getattr(family, "transformer_class", None)
    if not isinstance(name, str):
        raise NoKeyError("a family that names no class")
    return {"kind": "frame", "class": name, "config": family.transformer_config}


def _settings(folder: Path | None) -> dict[str, str]:
    """Checksums of the configurations that a model's folder holds, by name."""
    if folder is None:
        return {}
    files = sorted([*folder.glob("*.json"), *folder.glob("*/*.json")])
    return {
        file.relative_to(folder).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in files
        if file.stat().st_size <= _MAX_SETTINGS
    }


@cache
def _versions() -> dict[str, str]:
    """Libraries whose code builds and runs the models; a build for another device (2.13.0+cu130) is the same version."""
    return {name: version(name).partition("+")[0] for name in ("torch", "diffusers")}


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return repr(value)
    if isinstance(value, torch.dtype):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if is_dataclass(value) and not isinstance(value, type):
        kind = type(value)
        _check_own(kind)
        left_out = _NOT_COUNTED.get(kind, ())
        entries = {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
        kept = {name: entry for name, entry in entries.items() if name not in left_out}
        return {"class": f"{kind.__module__}.{kind.__qualname__}", **kept}
    raise NoKeyError(f"a {type(value).__name__}")


def _check_own(kind: type) -> None:
    if kind.__module__.partition(".")[0] not in OWN_PACKAGES:
        raise NoKeyError(f"a class of {kind.__module__}")
