"""Bounds for Triton's interpreter: a load or store beyond the tensors that a kernel was given is an error.

    with checked_bounds(): kernel[grid](...)

What is checked are the elements whose mask is on, each with its whole width, against the memory from a tensor's first to its
last element. Elsewhere the interpreter reads and writes whatever lies there.
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


class OutOfBoundsError(Exception):
    """A kernel touches memory that it was not given."""


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


def check(pointers: np.ndarray, mask: np.ndarray, width: int, *, given: list[tuple[int, int]], verb: str) -> None:
    """Raise OutOfBoundsError for the first element outside of every extent."""
    live = np.broadcast_to(pointers, np.broadcast_shapes(pointers.shape, mask.shape))[
        np.broadcast_to(mask, np.broadcast_shapes(pointers.shape, mask.shape)).astype(bool)
    ].astype(np.int64)
    inside = np.zeros(live.shape, dtype=bool)
    for start, end in given:
        inside |= (live >= start) & (live + width <= end)
    if not inside.all():
        place = int(live[~inside][0])
        start = max((start for start, _ in given if start <= place), default=0)
        raise OutOfBoundsError(f"a kernel {verb} {width} bytes at byte {place - start} behind the start of a tensor")


@contextmanager
def checked_bounds() -> Iterator[None]:
    """Check every access of interpreted kernels inside."""
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    load, store, arguments = builder.create_masked_load, builder.create_masked_store, executor._init_args_hst
    given: list[tuple[int, int]] = []

    def noted(self: Any, positional: Any, keywords: Any) -> Any:
        found = arguments(self, positional, keywords)
        given[:] = extents([*found[0], *found[1].values()])
        return found

    def checked_load(self: Any, ptrs: Any, mask: Any, *rest: Any) -> Any:
        width = np.dtype(interpreter._get_np_dtype(ptrs.get_element_ty())).itemsize
        check(ptrs.data, mask.data, width, given=given, verb="reads")
        return load(self, ptrs, mask, *rest)

    def checked_store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        check(ptrs.data, mask.data, value.data.itemsize, given=given, verb="writes")
        return store(self, ptrs, value, mask, *rest)

    with (
        patch.object(executor, "_init_args_hst", noted),
        patch.object(builder, "create_masked_load", checked_load),
        patch.object(builder, "create_masked_store", checked_store),
    ):
        yield
