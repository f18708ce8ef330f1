"""Constants, pointers and sizes of the kernels of fused fake quantization (fake_quantize.py, fake_gradient.py)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from qvgen_kernels.fake_quantize import RowSpec
from qvgen_kernels.triton.quantize_form import LARGEST

__all__ = ["RUN", "FakeForm", "FakeSizes", "FakeTensors", "fake_form"]

RUN = 32
"""Columns that are worked on together: the sums that torch keeps side by side."""

ELEMENTS = 1024
"""Elements of a tile, of rows times columns; four warps hold it."""

_FLOORS = {"float32": 0.0, "bfloat16": 1e-8, "float16": 6.103515625e-05}
"""Smallest scale after it was rounded to its type."""


@dataclass(frozen=True)
class FakeForm:
    """Constants of a compiled kernel; those without a word here are a RowSpec's.

    Attributes:
        kind, qmin, qmax, zero_point, arithmetic, floor, ceiling, factor, factored, raw, through_zero_point: As in RowSpec.
        scale_type: scale_dtype of the spec.
        smallest: What a scale is raised to after it was rounded to scale_type.
        largest: The largest finite number of scale_type; 0 for float32.
        columns: Columns of a group.
        groups: Groups of a row.
        rows: Groups of a program.
        block: Columns of a tile where the order of sums does not matter, a power of two.
        levels: Sixteens of whole runs of 32 columns in a group; see fake_gradient.py.
        runs: Whole runs that are left after them.
        registers: Whole eights of columns after the last run.
        rest: Columns after the last run.
    """

    kind: str
    qmin: int
    qmax: int
    zero_point: str
    arithmetic: str
    scale_type: str
    smallest: float
    largest: float
    floor: float
    ceiling: float
    factor: float
    factored: bool
    raw: bool
    through_zero_point: bool
    columns: int
    groups: int
    rows: int
    block: int
    levels: int
    runs: int
    registers: int
    rest: int


class FakeTensors(NamedTuple):
    """Pointers; what is not there is None. Gradients are float32 and lie densely."""

    x: Any
    first: Any
    second: Any
    low: Any
    high: Any
    scale: Any = None
    zero: Any = None
    row_sum: Any = None
    operand: Any = None
    helper: Any = None
    grad: Any = None
    grad_first: Any = None
    grad_second: Any = None


class FakeSizes(NamedTuple):
    """Sizes and strides in elements: groups of all rows, distance of x's rows."""

    segments: Any
    x_row: Any


def fake_form(spec: RowSpec, *, groups: int, segments: int) -> FakeForm:
    """The constants of a call with so many groups in a row and in all."""
    rows = min(ELEMENTS // RUN, max(1, 1 << (segments - 1).bit_length()))
    widest = max(RUN, 4 * ELEMENTS // rows)
    return FakeForm(
        kind=spec.kind,
        qmin=spec.qmin,
        qmax=spec.qmax,
        zero_point=spec.zero_point,
        arithmetic=spec.arithmetic,
        scale_type=spec.scale_dtype,
        smallest=_FLOORS[spec.scale_dtype],
        largest=LARGEST.get(spec.scale_dtype, 0.0),
        floor=spec.floor,
        ceiling=spec.ceiling,
        factor=spec.factor,
        factored=spec.factored,
        raw=spec.raw,
        through_zero_point=spec.through_zero_point,
        columns=spec.group,
        groups=groups,
        rows=rows,
        block=min(widest, 1 << (spec.group - 1).bit_length()),
        levels=spec.group // (16 * RUN),
        runs=spec.group // RUN % 16,
        registers=spec.group % RUN // 8,
        rest=spec.group % RUN,
    )
