"""Bounds and races for Triton's interpreter: what a kernel may touch, and when, is checked at every load and store.

    with checked_accesses(): kernel[grid](...)

Bounds: the elements whose mask is on, each with its whole width, against the memory from a tensor's first to its last
element. Elsewhere the interpreter reads and writes whatever lies there.

Races: programs of a grid run in any order on a card and here one after the other. So an element, known by its first byte,
that one program writes and another one reads or writes in the same launch is an error, whatever the values are. No kernel has
atomic operations, and of the warps of one program the interpreter has no notion. PyPI's ttsem 0.1.0 looks for both in
Triton's IR, but wants Python 3.12 and Triton 3.8.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch

interpreter = pytest.importorskip("triton.runtime.interpreter", reason="Triton is not installed here")

NOBODY, SEVERAL = 0, -1


class OutOfBoundsError(Exception):
    """A kernel touches memory that it was not given."""


class RaceError(Exception):
    """Two programs of a grid touch an element that one of them writes."""


def extent(tensor: torch.Tensor) -> tuple[int, int]:
    """First byte of a tensor, and the one after its last."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start = tensor.data_ptr()
    return start, start + (last + 1) * tensor.element_size() if tensor.numel() else start


def extents(arguments: Any) -> list[tuple[int, int]]:
    """Of all tensors among arguments, in tuples too."""
    if isinstance(arguments, torch.Tensor):
        return [extent(arguments)]
    if isinstance(arguments, list | tuple):
        return [found for part in arguments for found in extents(part)]
    return []


class Launch:
    """The memory of one launch: which program has written each byte, and which one has read it.

    Args:
        given: First byte of each tensor, and the one after its last; tensors may share memory.
    """

    def __init__(self, given: list[tuple[int, int]]) -> None:
        self.given = given
        self.blocks: list[tuple[int, int, np.ndarray, np.ndarray]] = []
        for start, end in sorted(given):
            if self.blocks and start < self.blocks[-1][1]:
                start, end = self.blocks[-1][0], max(end, self.blocks.pop()[1])
            size = end - start
            self.blocks.append((start, end, np.zeros(size, dtype=np.int32), np.zeros(size, dtype=np.int32)))

    def note(self, pointers: np.ndarray, mask: np.ndarray, width: int, *, program: int, writes: bool) -> None:
        """Note an access, whose every element has to lie in a tensor, and raise RaceError for one with another program's."""
        shape = np.broadcast_shapes(pointers.shape, mask.shape)
        live = np.broadcast_to(pointers, shape)[np.broadcast_to(mask, shape).astype(bool)].astype(np.int64)
        inside = np.zeros(live.shape, dtype=bool)
        for start, end in self.given:
            inside |= (live >= start) & (live + width <= end)
        if not inside.all():
            place = int(live[~inside][0])
            start = max((start for start, _ in self.given if start <= place), default=0)
            verb = "writes" if writes else "reads"
            raise OutOfBoundsError(
                f"a kernel {verb} {width} bytes at byte {place - start} behind the start of a tensor"
            )
        for start, end, writers, readers in self.blocks:
            here = live[(live >= start) & (live < end)] - start
            if here.size:
                self._note(here, writers, readers, program=program, writes=writes)

    @staticmethod
    def _note(here: np.ndarray, writers: np.ndarray, readers: np.ndarray, *, program: int, writes: bool) -> None:
        wrote, read = writers[here], readers[here]
        others = (wrote != NOBODY) & (wrote != program)
        if writes:
            others |= (read != NOBODY) & (read != program)
            writers[here] = program
        else:
            readers[here] = np.where((read == NOBODY) | (read == program), program, SEVERAL)
        if others.any():
            verb = "writes" if writes else "reads"
            raise RaceError(f"program {program - 1} {verb} byte {here[others][0]}, which another program touches too")


@contextmanager
def checked_accesses() -> Iterator[None]:
    """Check every access of interpreted kernels inside."""
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    load, store, arguments = builder.create_masked_load, builder.create_masked_store, executor._init_args_hst
    launches = [Launch([])]

    def noted(self: Any, positional: Any, keywords: Any) -> Any:
        found = arguments(self, positional, keywords)
        launches[0] = Launch(extents([*found[0], *found[1].values()]))
        return found

    def program_of(self: Any) -> int:
        (x, y, z), (columns, rows, _) = self.grid_idx, self.grid_dim
        return 1 + x + columns * (y + rows * z)

    def checked_load(self: Any, ptrs: Any, mask: Any, *rest: Any) -> Any:
        width = np.dtype(interpreter._get_np_dtype(ptrs.get_element_ty())).itemsize
        launches[0].note(ptrs.data, mask.data, width, program=program_of(self), writes=False)
        return load(self, ptrs, mask, *rest)

    def checked_store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        launches[0].note(ptrs.data, mask.data, value.data.itemsize, program=program_of(self), writes=True)
        return store(self, ptrs, value, mask, *rest)

    with (
        patch.object(executor, "_init_args_hst", noted),
        patch.object(builder, "create_masked_load", checked_load),
        patch.object(builder, "create_masked_store", checked_store),
    ):
        yield
