"""One process's part of a sharded checkpoint: its rows of each tensor, and what says which rows they are.

    rank-00001-of-00002.safetensors     the rows, one entry for each tensor, named by its place in the checkpoint
    rank-00001-of-00002.json            {"file": ..., "header": SHA-256,
                                         "tensors": {NAME: {"shape": [5120, 5120], "first_row": 2560, "sha256": ...}, ...}}

``shape`` is the whole tensor's, ``first_row`` null where it is not shared out. ``header`` is the checksum of the file's first
bytes up to the tensors, and each tensor has one of its own bytes: together they cover the file, and who needs a few tensors
checks and reads those alone. Rows are written as they lie in memory, one tensor after the other, without a copy of all.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from qvgen.deploy.tensor_file import TYPES, TensorFile, bytes_of
from qvgen.errors import UserError
from qvgen.quant.finite import is_finite

PART_FORMAT = "qvgen-checkpoint-part"

_CHUNK_BYTES = 1 << 24


@dataclass(frozen=True, kw_only=True, eq=False)
class Share:
    """Rows of a tensor that this process writes.

    Attributes:
        rows: Themselves; of a tensor without rows (a number) all of it.
        shape: Of the whole tensor.
        first_row: Place of the first of them; None of a tensor that every process has alike, and one writes whole.
    """

    rows: Tensor
    shape: torch.Size
    first_row: int | None = None

    def on_host(self) -> Share:
        """A copy that training does not change any more."""
        return Share(
            rows=self.rows.detach().to("cpu", copy=True).contiguous(), shape=self.shape, first_row=self.first_row
        )


def part_name(rank: int, world_size: int) -> str:
    """Name of a part's files, without the ending.

    Example:
        >>> part_name(0, 16)
        'rank-00001-of-00016'
    """
    return f"rank-{rank + 1:05d}-of-{world_size:05d}"


def check_kept(name: str, tensor: Tensor) -> None:
    """Raise UserError for a tensor of a kind that no part holds."""
    if tensor.dtype not in TYPES or tensor.layout != torch.strided:
        raise UserError(f"{name} is a tensor of {tensor.dtype}, {tensor.layout}, which no sharded checkpoint keeps")


def write_part(folder: Path, shares: Mapping[str, Share], *, rank: int, world_size: int) -> str:
    """Write both files of a part and force them to the disk.

    Args:
        folder: The checkpoint's.
        shares: What this process writes, by name.
        rank: This process.
        world_size: All.

    Returns:
        SHA-256 of the JSON file.

    Raises:
        OSError: They can't be written.
    """
    name = part_name(rank, world_size)
    for tensor, share in shares.items():
        if share.rows.dtype not in TYPES or share.rows.layout != torch.strided:
            raise UserError(
                f"{tensor} is a tensor of {share.rows.dtype}, {share.rows.layout}, which no checkpoint keeps"
            )
    # Wide types first, so that each begins at a multiple of its width.
    ordered = dict(sorted(shares.items(), key=lambda item: (-item[1].rows.itemsize, item[0])))
    header = _header(ordered)
    tensors = {}
    with _written(folder / f"{name}.safetensors") as file:
        file.write(header)
        for tensor, share in ordered.items():
            checksum = _write_rows(file, share.rows)
            tensors[tensor] = {"shape": list(share.shape), "first_row": share.first_row, "sha256": checksum}
    about = {
        "format": PART_FORMAT,
        "file": f"{name}.safetensors",
        "header": hashlib.sha256(header).hexdigest(),
        "tensors": tensors,
    }
    content = json.dumps(about, indent=1).encode()
    with _written(folder / f"{name}.json") as file:
        file.write(content)
    return hashlib.sha256(content).hexdigest()


@contextmanager
def _written(path: Path) -> Iterator[BinaryIO]:
    """A new file, forced to the disk at the end; an error names it, which Python's own does not while it is written."""
    try:
        with path.open("wb") as file:
            yield file
            force(file)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


def force(file: BinaryIO) -> None:
    """Have a file's bytes on the disk."""
    file.flush()
    os.fsync(file.fileno())


def _header(shares: Mapping[str, Share]) -> bytes:
    """The beginning of a safetensors file, padded so that the tensors begin at a multiple of 8."""
    entries, place = {}, 0
    for name, share in shares.items():
        rows = share.rows
        end = place + rows.numel() * rows.itemsize
        entries[name] = {"dtype": TYPES[rows.dtype], "shape": list(rows.shape), "data_offsets": [place, end]}
        place = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _write_rows(file: BinaryIO, rows: Tensor) -> str:
    """Write a tensor's bytes; returns their SHA-256."""
    checksum = hashlib.sha256()
    for chunk in _bytes_of(rows):
        file.write(chunk)
        checksum.update(chunk)
    return checksum.hexdigest()


def _bytes_of(rows: Tensor) -> Iterator[memoryview]:
    if rows.numel():
        flat = rows.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        yield from (memoryview(chunk.numpy()) for chunk in flat.split(_CHUNK_BYTES))


class Part:
    """A part that is read: a few megabytes at a time where it is checked, and rows that are asked for.

    Args:
        folder: The checkpoint's.
        name: Of its JSON file.
        content: Bytes of that file.

    Attributes:
        file: The file of tensors.
        tensors: By name, the whole tensor's shape, the first row and the checksum.

    Raises:
        ValueError: The content is none of such a file; also KeyError, TypeError or AttributeError.
    """

    def __init__(self, folder: Path, name: str, content: bytes) -> None:
        about = json.loads(content)
        if about["format"] != PART_FORMAT or about["file"] != name.removesuffix(".json") + ".safetensors":
            raise ValueError("it is of another format or of another part")
        self.file = folder / about["file"]
        self.tensors: dict[str, dict[str, Any]] = about["tensors"]
        self._header_checksum: str = about["header"]
        self._opened: TensorFile | None = None

    def check_header(self) -> None:
        """Raise ValueError unless the file begins as it was written, and names the tensors that the JSON file names."""
        with self.file.open("rb") as file:
            start = file.read(8)
            (size,) = struct.unpack("<Q", start)
            if size > self.file.stat().st_size:
                raise ValueError("it is shorter than its header says")
            header = start + file.read(size)
        if hashlib.sha256(header).hexdigest() != self._header_checksum:
            raise ValueError("its header does not have its checksum")
        if set(self._file.names) != set(self.tensors):  # opening it compares its length with the header
            raise ValueError("it holds other tensors than its JSON file says")

    def rows(self, name: str) -> int:
        """How many rows of a tensor the part has; 1 for a number."""
        shape = self.shape(name)
        return shape[0] if shape else 1

    def shape(self, name: str) -> torch.Size:
        """Sizes of what the part has of a tensor."""
        return self._file.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        """Type of a tensor's numbers."""
        return self._file.dtype(name)

    def whole(self, name: str) -> Tensor:
        """All rows that the part has, in memory of their own."""
        return self._file.whole(name)

    def check_tensor(self, name: str) -> bool:
        """Read all rows that the part has, and say whether they are finite.

        Raises:
            ValueError: Their checksum is another one.
        """
        checksum, finite = hashlib.sha256(), True
        for chunk in self._file.chunks(name):
            checksum.update(bytes_of(chunk))
            finite = finite and is_finite(chunk)
        if checksum.hexdigest() != self.tensors[name]["sha256"]:
            raise ValueError(f"{name} does not have its checksum")
        return finite

    def read(self, name: str, begin: int, end: int) -> Tensor:
        """Some of the rows that the part has, in memory of their own."""
        return self._file.rows(name, begin, end)

    @property
    def _file(self) -> TensorFile:
        if self._opened is None:
            self._opened = TensorFile(self.file)
        return self._opened
