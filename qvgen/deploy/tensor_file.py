"""A safetensors file of which one tensor is in memory at a time, or some rows of one, while it is read or written.

The library's own functions take all tensors at once, and what they read are mapped pages, which count as the process's memory
for as long as any tensor of the file is held. The format (https://github.com/huggingface/safetensors#format) is eight bytes
with the length of the header, the header (JSON: name, type, shape and place of each tensor), and the tensors' bytes. What is
written here has the bytes that the library writes: wide types stand first, types of one width in its own order, then names.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import torch
from torch import Tensor

from qvgen.models.folder.safetensors_header import read_header

TYPES = {
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fn: "F8_E4M3", torch.int16: "I16", torch.uint16: "U16", torch.float16: "F16",
    torch.bfloat16: "BF16", torch.int32: "I32", torch.uint32: "U32", torch.float32: "F32", torch.complex64: "C64",
    torch.float64: "F64", torch.int64: "I64", torch.uint64: "U64",
}  # fmt: skip
"""Name of each type in the format, those that stand last first."""

_DTYPES = {name: dtype for dtype, name in TYPES.items()}
_ORDER = {dtype: place for place, dtype in enumerate(TYPES)}

CHUNK_BYTES = 1 << 22
"""Bytes that are read at a time where a tensor is only looked at."""


class TensorFile:
    """A file that is read by its rows, from several threads if need be; it is not mapped.

    Args:
        path: The file.

    Attributes:
        names: The names of its tensors.

    Raises:
        ValueError: It is cut off, longer than its header says, or no safetensors file.
        OSError: It can't be read.
    """

    def __init__(self, path: Path) -> None:
        raw, self._entries = read_header(path)
        self.path, self._start = path, 8 + len(raw)
        end = max((entry["data_offsets"][1] for entry in self._entries.values()), default=0)
        if path.stat().st_size != self._start + end:
            raise ValueError("is longer than its header says")
        for name, entry in self._entries.items():
            begin, end = entry["data_offsets"]
            if entry["dtype"] not in _DTYPES or end - begin != math.prod(entry["shape"]) * self.dtype(name).itemsize:
                raise ValueError(f"has another type or size of {name!r} than its header says")

    @property
    def names(self) -> tuple[str, ...]:
        """All names, as the header has them."""
        return tuple(self._entries)

    def shape(self, name: str) -> torch.Size:
        """Sizes of a tensor."""
        return torch.Size(self._entries[name]["shape"])

    def dtype(self, name: str) -> torch.dtype:
        """Type of a tensor's numbers."""
        return _DTYPES[self._entries[name]["dtype"]]

    def whole(self, name: str) -> Tensor:
        """A tensor, in memory of its own."""
        return self._read(name, first=0, shape=self.shape(name))

    def rows(self, name: str, begin: int, end: int) -> Tensor:
        """Some rows of a tensor, in memory of their own."""
        columns = self.shape(name)[1:]
        return self._read(name, first=begin * math.prod(columns), shape=torch.Size([end - begin, *columns]))

    def chunks(self, name: str) -> Iterator[Tensor]:
        """All numbers of a tensor, flat, ``CHUNK_BYTES`` at a time."""
        total, step = math.prod(self.shape(name)), CHUNK_BYTES // self.dtype(name).itemsize
        for first in range(0, total, step):
            yield self._read(name, first=first, shape=torch.Size([min(step, total - first)]))

    def _read(self, name: str, *, first: int, shape: torch.Size) -> Tensor:
        found = torch.empty(shape, dtype=self.dtype(name))
        if found.numel():
            target = bytes_of(found)
            with self.path.open("rb", buffering=0) as file:
                file.seek(self._start + self._entries[name]["data_offsets"][0] + first * found.itemsize)
                while target:
                    count = file.readinto(target)
                    if not count:
                        raise ValueError("ends before its last tensor")
                    target = target[count:]
        return found


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the host, without a copy."""
    return memoryview(tensor.detach().reshape(-1).view(torch.uint8).numpy())


class TensorWriter:
    """A file whose tensors are written in any order, each once, from several threads if need be; a context manager.

    Args:
        path: The file; an earlier one is replaced.
        like: Name -> a tensor of the same type and shape; the meta device is enough.

    Raises:
        OSError: The disk is full.
    """

    def __init__(self, path: Path, like: Mapping[str, Tensor]) -> None:
        self._like = dict(sorted(like.items(), key=lambda item: (-_ORDER[item[1].dtype], item[0])))
        header: dict[str, Any] = {}
        end = 0
        for name, tensor in self._like.items():
            begin, end = end, end + tensor.numel() * tensor.element_size()
            header[name] = {"dtype": TYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
        content = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        content += b" " * (-len(content) % 8)
        self._places = {name: 8 + len(content) + entry["data_offsets"][0] for name, entry in header.items()}
        self._missing = set(self._like)
        self._file: BinaryIO = path.open("wb")
        self._file.write(len(content).to_bytes(8, "little") + content)
        self._file.flush()
        self._file.truncate(8 + len(content) + end)

    @property
    def names(self) -> tuple[str, ...]:
        """All names, in the order of the file."""
        return tuple(self._like)

    def put(self, name: str, value: Tensor) -> None:
        """Write a tensor.

        Raises:
            ValueError: It is of another type or shape than was said, of no such name, or was written before.
            OSError: The disk is full.
        """
        like = self._like.get(name)
        if like is None or name not in self._missing:
            raise ValueError(f"{name} was written before, or is no tensor of the file")
        if (value.dtype, value.shape) != (like.dtype, like.shape):
            raise ValueError(
                f"{name} is {value.dtype} {list(value.shape)}, and was to be {like.dtype} {list(like.shape)}"
            )
        self._missing.remove(name)
        left, place = bytes_of(value.detach().cpu().contiguous()), self._places[name]
        while left:
            count = os.pwrite(self._file.fileno(), left, place)
            left, place = left[count:], place + count

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if kind is None and self._missing:
            raise ValueError(f"{min(self._missing)} and {len(self._missing) - 1} other tensors were not written")


def write_tensors(path: Path, like: Mapping[str, Tensor], value_of: Callable[[str], Tensor]) -> None:
    """Write a file of tensors, asking for one after another.

    Args:
        path: The file; an earlier one is replaced.
        like: Name -> a tensor of the same type and shape; the meta device is enough.
        value_of: Gives a tensor's values, on the host, once for each name.

    Raises:
        ValueError: A value is of another type or shape than was said.
        OSError: The disk is full.
    """
    with TensorWriter(path, like) as file:
        for name in file.names:
            file.put(name, value_of(name))
