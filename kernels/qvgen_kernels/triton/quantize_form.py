"""The words for the quantizer's kernel: constants of its code, pointers and sizes; and what it makes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qvgen_kernels.contract import SCALE_FLOOR, LinearSpec
from qvgen_kernels.input_steps import InputSteps, InputTensors
from qvgen_kernels.triton.layout import layout_of, unsigned_activations

__all__ = [
    "TILE",
    "WIDEST_TILE",
    "Operands",
    "QuantizeForm",
    "QuantizeSizes",
    "QuantizeTensors",
    "StepsBefore",
    "form_with_steps",
    "holds_whole_rows",
    "quantize_form",
    "warps_of",
    "with_steps",
]

LARGEST = {"bfloat16": 2.0**127 * (2 - 2.0**-7), "float16": 65504.0}

WIDEST_TILE = 256
"""Vectors of rows are this long or a multiple, so that no tile of the product reads beyond them."""

_BLOCK = 8192
"""Columns that a program holds at a time, at most."""

TILE = 4096
"""Elements that four warps hold."""

WIDEST_WHOLE = 16384
"""Columns of a row that a program holds whole where steps come before its codes; sixteen warps do."""


class Operands(NamedTuple):
    """Quantized rows.

    Attributes:
        codes: int8 [M, K'], columns padded by groups as the weight's.
        scale: float32 [Ga, M']; NaN in rows that are not finite. M' is M rounded up to a multiple of every tile.
        shift: int32 [Ga, M'], 128 - zero point; None where operands are q - z.
        row_sum: int32 [G, M'], sums of q - z; None where nothing needs them.
    """

    codes: Tensor
    scale: Tensor
    shift: Tensor | None
    row_sum: Tensor | None


@dataclass(frozen=True)
class QuantizeForm:
    """Constants of a compiled quantizer: what its code is for.

    Attributes:
        segment: Columns that share a scale.
        group: Columns of a group, which a segment holds one or more of.
        padded_group: Columns between the starts of two groups in the output.
        groups: Groups of a segment.
        segments: Segments of a row.
        qmax: Largest code.
        symmetric: Without zero points.
        static: Scales and zero points are given.
        shifted: Codes are stored minus 128.
        arithmetic: activation_arithmetic of the spec.
        scale_type: scale_dtype of the spec.
        floor: Its smallest scale.
        largest: Its largest finite number; 0 for float32.
        rows: Segments of a program.
        block: Columns that are read at a time, a power of two.
        steps: Whether steps come before the codes; what follows belongs to them.
        whole: A segment is read once and stays in registers.
        samples: x has a stride for samples besides that for rows.
        norm: Norm of the steps; then their eps, and the type T of the input after them.
        eps: See norm.
        dtype: See norm.
        round_to: Type that norm, product and sum are each rounded to.
        function: How the function is computed (input_steps.py); "none".
        interpreted: For Triton's interpreter.
    """

    segment: int
    group: int
    padded_group: int
    groups: int
    segments: int
    qmax: int
    symmetric: bool
    static: bool
    shifted: bool
    arithmetic: str
    scale_type: str
    floor: float
    largest: float
    rows: int
    block: int
    steps: bool = False
    whole: bool = False
    samples: bool = False
    norm: str = "none"
    eps: float = 0.0
    dtype: str = "float32"
    round_to: str = "float32"
    function: str = "none"
    interpreted: bool = False


class QuantizeTensors(NamedTuple):
    """Pointers of the kernel; what is not there is None."""

    x: Any
    codes: Any
    scale: Any
    shift: Any
    row_sum: Any
    input_scale: Any
    clip_low: Any
    clip_high: Any
    row_scale: Any
    row_zero_point: Any
    gain: Any = None
    shift_by: Any = None
    gain_of_row: Any = None
    norm_weight: Any = None
    norm_bias: Any = None


class QuantizeSizes(NamedTuple):
    """Sizes and strides of the kernel, in elements; ``gain_rows`` rows follow each other that take one row of gain."""

    segments: Any
    x_row: Any
    x_column: Any
    codes_row: Any
    vector_row: Any
    gain_rows: Any = 1
    gain_count: Any = 1
    gain_row: Any = 0
    shift_row: Any = 0
    sample_rows: Any = 1
    x_sample: Any = 0


def quantize_form(spec: LinearSpec, *, segments: int) -> QuantizeForm:
    """The constants of the quantizer of a layer.

    Args:
        spec: The layer.
        segments: All segments of the call.
    """
    layout = layout_of(spec)
    per_row = spec.in_features // (spec.activation_group_size or spec.in_features)
    block = min(_BLOCK, _power_of_two(layout.padded_group))
    rows = max(1, min(TILE // block, _power_of_two(segments)))
    return QuantizeForm(
        segment=spec.in_features // per_row,
        group=layout.group,
        padded_group=layout.padded_group,
        groups=layout.groups // per_row,
        segments=per_row,
        qmax=spec.activation_qmax,
        symmetric=spec.activation_zero_point == "none",
        static=spec.activation_range == "static",
        shifted=unsigned_activations(spec),
        arithmetic=spec.activation_arithmetic,
        scale_type=spec.scale_dtype,
        floor=SCALE_FLOOR[spec.scale_dtype],
        largest=LARGEST.get(spec.scale_dtype, 0.0),
        rows=rows,
        block=block,
    )


class StepsBefore(NamedTuple):
    """Steps that the kernel computes.

    Attributes:
        steps: Norm, eps, and T.
        tensors: Their tensors.
        variant: How the function is computed (steps.py); "none".
    """

    steps: InputSteps
    tensors: InputTensors
    variant: str


def form_with_steps(
    form: QuantizeForm,
    steps: InputSteps,
    *,
    dtype: torch.dtype,
    round_to: torch.dtype,
    variant: str,
    interpreted: bool = False,
) -> QuantizeForm:
    """The constants of a quantizer with steps before it.

    Args:
        form: The constants of the layer alone.
        steps: Norm and eps.
        dtype: T.
        round_to: Type that norm, product and sum are each rounded to.
        variant: How the function is computed.
        interpreted: For Triton's interpreter.
    """
    block = _power_of_two(form.padded_group)
    whole = form.groups == 1 and block <= WIDEST_WHOLE
    block = block if whole else form.block
    return replace(
        form,
        block=block,
        rows=max(1, min(TILE // block, form.rows)),
        steps=True,
        whole=whole,
        norm=steps.norm,
        eps=steps.eps,
        dtype=_name(dtype),
        round_to=_name(round_to),
        function=variant,
        interpreted=interpreted,
    )


def with_steps(
    form: QuantizeForm,
    given: QuantizeTensors,
    sizes: QuantizeSizes,
    before: StepsBefore,
    *,
    interpreted: bool,
) -> tuple[QuantizeForm, QuantizeTensors, QuantizeSizes]:
    """The constants, tensors and sizes of a layer alone, with steps before it."""
    steps, tensors, x = before.steps, before.tensors, given.x
    dtype = steps.output_dtype(x)
    round_to = dtype if tensors.gain is None else tensors.gain.dtype
    form = form_with_steps(form, steps, dtype=dtype, round_to=round_to, variant=before.variant, interpreted=interpreted)
    gain, shift = (None if rows is None else _dense_rows(rows) for rows in (tensors.gain, tensors.shift))
    vectors = (None if value is None else value.contiguous() for value in tensors[2:])
    given = given._replace(**dict(zip(_STEP_FIELDS, (gain, shift, *vectors), strict=True)))
    if gain is not None and shift is not None:
        sizes = sizes._replace(
            gain_rows=max(1, x.shape[:-1].numel() // len(gain)),
            gain_count=len(gain),
            gain_row=gain.stride(0),
            shift_row=shift.stride(0),
        )
    if x.ndim == 3:
        form, sizes = replace(form, samples=True), sizes._replace(sample_rows=x.shape[1], x_sample=x.stride(0))
    return form, given, sizes


_STEP_FIELDS = ("gain", "shift_by", "gain_of_row", "norm_weight", "norm_bias")
"""Fields of QuantizeTensors that hold those of InputTensors."""


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dense_rows(rows: Tensor) -> Tensor:
    """Rows whose columns lie side by side; a view where they do."""
    return rows if rows.stride(1) == 1 else rows.contiguous()


def holds_whole_rows(spec: LinearSpec) -> bool:
    """Whether a program can hold a whole row, which a norm needs."""
    layout = layout_of(spec)
    return layout.groups == 1 and _power_of_two(layout.padded_group) <= WIDEST_WHOLE


def warps_of(form: QuantizeForm) -> int:
    """Warps of a program: 32 numbers of a row in each of their threads."""
    return {1: 4, 2: 8}.get(-(-form.rows * form.block // TILE), 16)


def _power_of_two(least: int) -> int:
    return 1 << (least - 1).bit_length()
