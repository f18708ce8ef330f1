"""A tensor that lies in a sharded checkpoint and has not been read yet, and models that take tensors from there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qvgen.training.checkpoint.part import Part


class SavedTensor:
    """Rows that several files hold; ``saved[4:8]`` reads four of them, :meth:`whole` all.

    Args:
        name: Its place in the checkpoint.
        parts: The parts that hold rows of it.

    Attributes:
        shape: Of the whole tensor.
        dtype: Of its numbers.
        is_shared_out: Whether each process had some of its rows; else all had all of it.

    Raises:
        ValueError: The parts do not have each row once, or not of one shape and type.
    """

    def __init__(self, name: str, parts: Sequence[Part]) -> None:
        self.name = name
        first_rows = [part.tensors[name]["first_row"] for part in parts]
        entries = sorted((first_rows[index] or 0, part.rows(name), index) for index, part in enumerate(parts))
        self._pieces = [(first, rows, parts[index]) for first, rows, index in entries if rows]
        shapes = {tuple(part.tensors[name]["shape"]) for part in parts}
        dtypes = {part.dtype(name) for part in parts}
        if len(shapes) != 1 or len(dtypes) != 1:
            raise ValueError(f"{name} has several shapes or types")
        self.is_shared_out = None not in first_rows
        self.shape, (self.dtype,) = torch.Size(shapes.pop()), dtypes
        place = 0
        for first, rows, part in self._pieces:
            if first != place or list(part.shape(name)[1:]) != list(self.shape[1:]):
                raise ValueError(f"row {place} of {name} is in no part, or in several")
            place += rows
        if place != (self.shape[0] if self.shape else 1):
            raise ValueError(f"rows from {place} on of {name} are in no part")

    def __getitem__(self, rows: slice) -> Tensor:
        """Read rows, into memory of their own."""
        begin, end, step = rows.indices(self.shape[0])
        if step != 1:
            raise ValueError(f"a saved tensor has rows one after the other, and not every {step}th")
        found = torch.empty((max(0, end - begin), *self.shape[1:]), dtype=self.dtype)
        for first, count, part in self._pieces:
            low, high = max(begin, first), min(end, first + count)
            if low < high:
                found[low - begin : high - begin] = part.read(self.name, low - first, high - first)
        return found

    def whole(self) -> Tensor:
        """Read all rows, into memory of their own."""
        if not self._pieces:
            return torch.empty(self.shape, dtype=self.dtype)
        if len(self._pieces) == 1:
            return self._pieces[0][2].whole(self.name)
        return self[:]


def load_tensors_(model: nn.Module, tensors: Mapping[str, Tensor | SavedTensor], *, strict: bool = True) -> None:
    """Copy tensors into a model, module by module: saved ones are read for one module at a time.

    Args:
        model: Whole.
        tensors: By name.
        strict: The model has no others.

    Raises:
        RuntimeError: One is missing or has another shape.
        KeyError: The model has no tensor of a name.
    """
    known = model.state_dict().keys()
    if unknown := next((name for name in tensors if name not in known), None):
        raise KeyError(unknown)
    if strict and (missing := next((name for name in known if name not in tensors), None)):
        raise RuntimeError(f"{missing} is missing")
    for prefix, module in model.named_modules(remove_duplicate=False):
        names = [
            *(name for name, _ in module.named_parameters(recurse=False)),
            *dict(module.named_buffers(recurse=False)),
        ]
        own = {name: tensors[full] for name in names if (full := f"{prefix}.{name}" if prefix else name) in tensors}
        if own:
            module.load_state_dict(whole_values(own), strict=False)


def whole_values(value: Any) -> Any:
    """Nested values with each saved tensor read as a whole."""
    if isinstance(value, SavedTensor):
        return value.whole()
    if isinstance(value, dict):
        return type(value)((key, whole_values(entry)) for key, entry in value.items())
    if type(value) in (list, tuple):
        return type(value)(whole_values(entry) for entry in value)
    return value
