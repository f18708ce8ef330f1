"""The header of a safetensors file: what the file holds, read without its tensors.

    8 bytes   length of the header, little-endian
    header    JSON: name -> {dtype, shape, data_offsets [begin, end]}, and ``__metadata__``
    bytes     of all tensors

Source: the format's specification (https://github.com/huggingface/safetensors).
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_MAX_HEADER_BYTES = 100_000_000
"""Largest header in bytes: the format's own limit."""

_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def read_header(path: Path) -> tuple[bytes, dict[str, dict[str, Any]]]:
    """Read a file's header and check that all of its tensors lie within the file.

    Args:
        path: the file.

    Returns:
        The header's bytes; name -> its entry, ``__metadata__`` left out.

    Raises:
        ValueError: it is cut off, the pointer that git-lfs leaves in its place, or no safetensors file at all; the message
            is a clause that follows on the file's name.
        OSError: it can't be read.
    """
    size = path.stat().st_size
    with path.open("rb") as stream:
        begin = stream.read(len(_LFS_POINTER))
        if begin == _LFS_POINTER:
            raise ValueError("is the pointer that git-lfs leaves in place of the weights; run `git lfs pull` there")
        if size == 0:
            raise ValueError("is empty: its download was not finished")
        stream.seek(0)
        (length,) = struct.unpack("<Q", stream.read(8).ljust(8, b"\xff"))
        if not 2 <= length <= _MAX_HEADER_BYTES:
            raise ValueError("is no safetensors file (it has no header)")
        raw = stream.read(length)
    if len(raw) < length:
        raise ValueError(f"is cut off: it has {size} bytes, its header alone takes {8 + length}")
    try:
        entries = {str(name): entry for name, entry in json.loads(raw).items() if name != "__metadata__"}
        end = max((_check_entry(entry) for entry in entries.values()), default=0)
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"is no safetensors file (its header is damaged: {type(error).__name__})") from error
    if size < 8 + length + end:
        raise ValueError(f"is cut off: it has {size} of {8 + length + end} bytes")
    return raw, entries


def _check_entry(entry: dict[str, Any]) -> int:
    """Raise where a header's entry is none; the end of its tensor's bytes."""
    begin, end = entry["data_offsets"]
    numbers = [begin, end - begin, *entry["shape"]]
    if not all(isinstance(number, int) and number >= 0 for number in numbers) or not isinstance(entry["dtype"], str):
        raise ValueError("an entry with other than sizes")
    return int(end)


def first_bytes(path: Path, header: tuple[bytes, dict[str, dict[str, Any]]], *, count: int) -> Iterator[bytes]:
    """The beginning of each tensor, in order of name.

    Args:
        path: the file.
        header: what :func:`read_header` returned for it.
        count: bytes of a tensor, fewer where it has fewer.
    """
    raw, entries = header
    with path.open("rb") as stream:
        for _, entry in sorted(entries.items()):
            begin, end = entry["data_offsets"]
            stream.seek(8 + len(raw) + begin)
            yield stream.read(min(end - begin, count))
