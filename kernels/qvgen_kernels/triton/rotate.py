"""Hadamard transform of rows (kernels/README.md, step 1), in the contract's order of operations, by one or two kernels.

``butterfly_kernel`` takes runs of n = 2^m columns in registers: they are split into their two (or, of the regular kind,
four) halves at each stride, which is a matter of layouts alone. ``paley_kernel`` adds the b runs of a block, four at a
time; a sign is a float32 factor, whose product is exact. Between the two, rows lie in memory as float32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from qvgen_kernels.contract import LinearSpec
from qvgen_kernels.hadamard import paley_factor, paley_signs
from qvgen_kernels.triton.launch import launch

__all__ = ["rotate_rows"]

_TILE = 4096
"""Elements of a program."""


@dataclass(frozen=True)
class RotateForm:
    """Constants of a compiled butterfly.

    Attributes:
        columns: K.
        run: n, columns that are transformed together.
        runs: Runs of a program.
        radix: 2, or 4 for the regular kind.
        factor: Every element is multiplied by it at the end; 1 where another kernel follows.
    """

    columns: int
    run: int
    runs: int
    radix: int
    factor: float


class RotateTensors(NamedTuple):
    """Pointers: x [M, K] of any strides, float32 out [M, K], input_scale [K] or None."""

    x: Any
    out: Any
    input_scale: Any


class RotateSizes(NamedTuple):
    """All runs, and x's strides."""

    runs: Any
    x_row: Any
    x_column: Any


@triton.jit
def _butterfly(v, stride: tl.constexpr, runs: tl.constexpr, run: tl.constexpr):
    """(a + b, a - b) of elements that lie ``stride`` apart."""
    halves = tl.permute(tl.reshape(v, (runs * run // (2 * stride), 2, stride)), (0, 2, 1))
    a, b = tl.split(halves)
    return tl.reshape(tl.permute(tl.join(a + b, a - b), (0, 2, 1)), (runs, run))


@triton.jit
def _regular(v, stride: tl.constexpr, runs: tl.constexpr, run: tl.constexpr):
    """The regular 4 x 4 matrix on elements that lie ``stride`` apart."""
    quarters = tl.permute(tl.reshape(v, (runs * run // (4 * stride), 2, 2, stride)), (0, 3, 2, 1))
    even, odd = tl.split(quarters)  # [.., stride, 2]: x0 x1, and x2 x3
    x0, x1 = tl.split(even)
    x2, x3 = tl.split(odd)
    low = tl.join((x0 + x1) + (x2 - x3), (x0 + x1) - (x2 - x3))
    high = tl.join((x2 + x3) + (x0 - x1), (x2 + x3) - (x0 - x1))
    return tl.reshape(tl.permute(tl.join(low, high), (0, 3, 2, 1)), (runs, run))


@triton.jit
def butterfly_kernel(t, sizes, form: tl.constexpr, steps: tl.constexpr):
    """Transform ``form.runs`` runs."""
    index = tl.program_id(0).to(tl.int64) * form.runs + tl.arange(0, form.runs)
    per_row = form.columns // form.run
    row, first = index // per_row, (index % per_row) * form.run
    column = first[:, None] + tl.arange(0, form.run)[None, :]
    live = (index < sizes.runs)[:, None] & (column >= 0)
    v = tl.load(t.x + row[:, None] * sizes.x_row + column * sizes.x_column, mask=live, other=0.0).to(tl.float32)
    if t.input_scale is not None:
        v = v * tl.load(t.input_scale + column, mask=live, other=0.0)
    for step in tl.static_range(steps):
        if form.radix == 4:  # noqa: SIM108 - a branch that only the compiler takes
            v = _regular(v, 4**step, form.runs, form.run)
        else:
            v = _butterfly(v, 2**step, form.runs, form.run)
    if form.factor != 1.0:
        v = v * form.factor
    tl.store(t.out + row[:, None] * form.columns + column, v, mask=live)


@dataclass(frozen=True)
class PaleyForm:
    """Constants of a compiled sum over the runs of a block.

    Attributes:
        order: b.
        run: n.
        outputs: Runs that a program makes.
        columns: Columns of each, a power of two that divides n.
        factor: Every element is multiplied by it at the end.
    """

    order: int
    run: int
    outputs: int
    columns: int
    factor: float


@triton.jit
def _signed(x, signs, column, outputs, order: tl.constexpr):
    """One run with the signs that it has in every output."""
    return x[None, :] * tl.load(signs + outputs * order + column, mask=outputs < order, other=0.0)[:, None]


@triton.jit
def paley_kernel(x, signs, out, form: tl.constexpr):
    """Sum the b runs of a block for ``form.outputs`` of its b outputs, over ``form.columns`` columns."""
    start = tl.program_id(0).to(tl.int64) * (form.order * form.run)
    column = tl.program_id(1) * form.columns + tl.arange(0, form.columns)
    outputs = tl.program_id(2) * form.outputs + tl.arange(0, form.outputs)
    y = tl.full((form.outputs, form.columns), 0.0, tl.float32)
    for j in range(0, form.order, 4):
        runs = x + start + j * form.run + column
        first = _signed(tl.load(runs), signs, j, outputs, form.order)
        first += _signed(tl.load(runs + form.run), signs, j + 1, outputs, form.order)
        second = _signed(tl.load(runs + 2 * form.run), signs, j + 2, outputs, form.order)
        second += _signed(tl.load(runs + 3 * form.run), signs, j + 3, outputs, form.order)
        y += first + second
    target = out + start + outputs[:, None] * form.run + column[None, :]
    tl.store(target, y * form.factor, mask=(outputs < form.order)[:, None] & (column >= 0)[None, :])


def rotate_rows(x: Tensor, *, spec: LinearSpec, input_scale: Tensor | None) -> Tensor:
    """Smooth and rotate rows.

    Args:
        x: float32, bfloat16 or float16 [M, K] of any strides, M > 0.
        spec: The layer; it has a rotation.
        input_scale: float32 [K] or None.

    Returns:
        float32 [M, K], equal to ``qvgen_kernels.hadamard.block_hadamard`` to the bit.
    """
    block, regular = spec.rotation, spec.rotation_kind == "regular"
    b = 1 if regular else paley_factor(block)
    run, radix = block // b, 4 if regular else 2
    factor = 1.0 / math.sqrt(block)
    runs = x.numel() // run
    form = RotateForm(
        spec.in_features, run, max(1, min(_TILE // run, 1 << (runs - 1).bit_length())), radix, factor if b == 1 else 1.0
    )
    out = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    steps = (run.bit_length() - 1) // (2 if regular else 1)
    grid = (triton.cdiv(runs, form.runs),)
    tensors = RotateTensors(x, out, input_scale)
    launch(
        butterfly_kernel,
        grid,
        tensors,
        RotateSizes(runs, *x.stride()),
        form,
        steps,
        on=x,
        num_warps=4 if run <= _TILE else 16,
    )
    if b == 1:
        return out
    columns = min(run, 64)
    outputs = min(64, 1 << (b - 1).bit_length())
    paley = PaleyForm(b, run, outputs, columns, factor)
    rotated = torch.empty_like(out)
    grid = (x.numel() // block, run // columns, triton.cdiv(b, outputs))
    launch(paley_kernel, grid, out, _signs(b, x.device), rotated, paley, on=x, num_warps=4)
    return rotated


@lru_cache(maxsize=64)
def _signs(b: int, device: torch.device) -> Tensor:
    """float32 [b, b] of 1 and -1 on a device; made once, before a graph of the device's work could be captured twice."""
    with torch.device("cpu"):
        signs = torch.tensor(paley_signs(b), dtype=torch.float32)
    return signs.to(device)
