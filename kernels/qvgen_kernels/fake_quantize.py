"""Fused fake quantization: the quantize half of a trainable layer's passes as registered operators.

    qvgen::quantize_rows           rows to the operand of a product, in one pass after their extremes
    qvgen::row_scales              the scales of rows whose extremes are known
    qvgen::quantize_rows_backward  straight-through gradients and the operand again, in one pass; dx replaces the gradient
    qvgen::scale_output            scales, zero points, branch and bias onto a product, in place
    qvgen::scale_gradient          a product's gradient times the scales of its columns, and times those of its rows

The arithmetic is that of the packed linear's quantizer (kernels/README.md, steps 2 to 4) with the straight-through
formulas of qvgen.quant.ste, one IEEE float32 operation at a time. Sums of rows are added up in the order of torch's own
sum, so that whoever computes with torch in place of these operators gets the same bits: they are a matter of speed
alone, and where :func:`refusal` has a reason, the caller takes torch.

A device's implementation registers itself with :func:`register_implementation` under torch's dispatch key: the CPU's is
fake_quantize_cpu.py, that of CUDA and ROCm triton/fake_backend.py. All add rows up in the order of torch's sum on a CPU, so
they agree with each other to the bit; torch's own sum on a GPU has an order of its own, from which gradients of scales, zero
points and clips differ in last bits there. Shapes are known without values, so meta tensors, fake tensors and torch.compile
see plain operators. No operator has a gradient of its own: they are parts of one ``torch.autograd.Function``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

__all__ = ["RowSpec", "fits_int8", "operators", "refusal", "register_implementation"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_EXACT = 2**24
"""Whole numbers up to here have an exact float32 sum in any order."""
_LARGEST_INT8 = 127

SCHEMAS = (
    "quantize_rows(Tensor x, Tensor[] params, Tensor? helper, str spec, ScalarType dtype) "
    "-> (Tensor operand, Tensor scale, Tensor zero, Tensor low, Tensor high, Tensor row_sum)",
    "row_scales(Tensor[] extremes, Tensor[] params, str spec) -> Tensor",
    "quantize_rows_backward(Tensor(a!) grad, Tensor x, Tensor[] params, Tensor[] extremes, str spec, ScalarType? dtype) "
    "-> (Tensor operand, Tensor grad_first, Tensor grad_second)",
    "scale_output(Tensor(a!) y, Tensor? row_scale, Tensor? column_scale, Tensor? row_sum, Tensor? column_zero, "
    "Tensor? branch, Tensor? bias) -> ()",
    "scale_gradient(Tensor grad, Tensor row_scale, Tensor column_scale, ScalarType dtype) "
    "-> (Tensor by_row, Tensor by_column)",
)
"""``params``: first and second of :class:`RowSpec` (symmetric weights: no second); ``extremes``: low and high, or none."""


@dataclass(frozen=True, kw_only=True)
class RowSpec:
    """How rows are quantized.

    Attributes:
        kind: ``dynamic``: a scale from each group's extremes, times the clip factors first and second [M, 1] of its row;
            ``static``: first and second [M, 1] are scale and zero point; ``learned``: they are [N, G] and brought to
            the grid before: floored; integer zero points rounded and clamped to codes, real ones to +-2^17.
        qmin: Smallest code.
        qmax: Largest code.
        zero_point: integer, real or none (symmetric).
        group: Columns that share a scale.
        arithmetic: reciprocal, division or unrounded, as in ``LinearSpec.activation_arithmetic``.
        scale_dtype: What scales are rounded to.
        floor: At a scale of this and below nothing depends on the range any more.
        ceiling: The same for a scale of this and above.
        factor: On the gradients of learned parameters.
        factored: The scale stays outside of the product: the operand is q - z, and s (q - z) otherwise.
        raw: The operand is q, where z is real and stays outside of the product, too.
        row_sums: Whether the sums of q - z of each row are wanted.
        through_zero_point: Whether the gradient of a dynamic range takes the path through its zero point.
    """

    kind: str
    qmin: int
    qmax: int
    zero_point: str
    group: int
    arithmetic: str = "reciprocal"
    scale_dtype: str = "float32"
    floor: float = 0.0
    ceiling: float = 0.0
    factor: float = 1.0
    factored: bool = True
    raw: bool = False
    row_sums: bool = False
    through_zero_point: bool = True

    @lru_cache(maxsize=1024)  # noqa: B019 - a value without references to anything
    def to_string(self) -> str:
        """The operators' argument."""
        return json.dumps(asdict(self))

    @staticmethod
    @lru_cache(maxsize=1024)
    def from_string(text: str) -> RowSpec:
        """Inverse of :meth:`to_string`."""
        return RowSpec(**json.loads(text))


_library = torch.library.Library("qvgen", "FRAGMENT")
_reasons: dict[str, Callable[[], str | None]] = {}
_direct: dict[str, Any] = {}


def register_implementation(
    device_type: str,
    functions: dict[str, Callable[..., object]],
    *,
    refusal: Callable[[], str | None],
    direct: bool = False,
) -> None:
    """Add a device's implementation of all five operators.

    Args:
        device_type: As in ``torch.device.type``.
        functions: By name of the operator.
        refusal: Why it does not run on this machine; None if it does. Called at the first use.
        direct: Whether the functions may be called without torch's dispatcher; see :func:`operators`.
    """
    for schema in SCHEMAS:
        name = schema.split("(")[0]
        _library.impl(name, functions[name], device_type.upper())
    _reasons[device_type] = refusal
    if direct:
        _direct[device_type] = SimpleNamespace(**functions)


def operators(x: Tensor) -> Any:
    """The five operators for tensors like x, as functions by name.

    Where x is a plain tensor and no mode listens to torch's operators, they are the implementation itself: torch's
    dispatcher takes longer to pass a list, a text and six results through than a small layer's rows take to be quantized.
    """
    if type(x) in _PLAIN and x.device.type in _direct and not torch._C._len_torch_dispatch_stack():
        return _direct[x.device.type]
    return torch.ops.qvgen


_PLAIN = (Tensor, torch.nn.Parameter)


def missing_reason(device_type: str) -> str | None:
    """Why a device has no fused operators; None if it has."""
    if device_type not in _reasons:
        return f"there are no fused operators for {device_type}"
    return _reasons[device_type]()


def refusal(x: Tensor, spec: RowSpec) -> str | None:
    """Why the operators do not quantize these rows with torch's bits; None if they do.

    Args:
        x: [M, K].
        spec: How.
    """
    if x.dtype not in DTYPES or not x.numel():
        return f"{x.dtype} {list(x.shape)} is not fused"
    if x.stride(1) != 1:
        return "columns do not lie side by side"
    if spec.kind == "dynamic" and spec.zero_point == "real":
        return "ranges with a real zero point need not contain 0"
    if not 8 <= spec.group < _EXACT or x.shape[1] * max(spec.qmax, -spec.qmin) >= _EXACT:
        return f"torch sums groups of {spec.group} columns in another order"
    alone = x.device.type == "cpu" and x.shape[0] * (x.shape[1] // spec.group) == 1
    if alone and torch.get_num_threads() > 1:
        return "torch shares the sum of a single row among threads"
    return missing_reason(x.device.type)


def fits_int8(spec: RowSpec) -> bool:
    """Whether operands may be asked for as int8: whole numbers from -127 to 127, the scale outside.

    A row whose operand would have a NaN has a scale that is NaN then, and its operand is 0 there.
    """
    whole = spec.factored and (spec.zero_point != "real" or spec.raw)
    if spec.zero_point == "integer" and not spec.raw:
        return whole and spec.qmax - spec.qmin <= _LARGEST_INT8
    return whole and max(spec.qmax, -spec.qmin) <= _LARGEST_INT8


def _quantize_rows_fake(
    x: Tensor,
    params: Sequence[Tensor],  # noqa: ARG001 - the operator's signature
    helper: Tensor | None,  # noqa: ARG001
    spec: str,
    dtype: torch.dtype,
) -> tuple[Tensor, ...]:
    return quantized_outputs(x, RowSpec.from_string(spec), dtype)


def quantized_outputs(x: Tensor, spec: RowSpec, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Uninitialized results of quantize_rows: what is not asked for has no elements."""
    rows, columns = x.shape
    shape, nothing = (rows, columns // spec.group), (0,)
    known = shape if spec.kind == "dynamic" else nothing
    return (
        x.new_empty((rows, columns), dtype=dtype),
        *(
            x.new_empty(size, dtype=torch.float32)
            for size in (shape, shape if spec.zero_point == "real" else nothing, known, known)
        ),
        x.new_empty((rows,) if spec.row_sums else nothing, dtype=torch.float32),
    )


def _row_scales_fake(extremes: Sequence[Tensor], params: Sequence[Tensor], spec: str) -> Tensor:  # noqa: ARG001
    return torch.empty_like(extremes[0], memory_format=torch.contiguous_format)


def _backward_fake(
    grad: Tensor,  # noqa: ARG001
    x: Tensor,
    params: Sequence[Tensor],  # noqa: ARG001
    extremes: Sequence[Tensor],  # noqa: ARG001
    spec: str,
    dtype: torch.dtype | None,
) -> tuple[Tensor, ...]:
    return gradient_outputs(x, RowSpec.from_string(spec), dtype)


def gradient_outputs(x: Tensor, spec: RowSpec, dtype: torch.dtype | None) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialized results of quantize_rows_backward; no operand where ``dtype`` is None."""
    shape = (x.shape[0], x.shape[1] // spec.group)
    operand = x.new_empty(x.shape if dtype else (0,), dtype=dtype or torch.float32)
    return operand, x.new_empty(shape, dtype=torch.float32), x.new_empty(shape, dtype=torch.float32)


def check_gradient(grad: Tensor, x: Tensor) -> None:
    """Raise ValueError for a gradient that dx can't be written over."""
    if grad.dtype != torch.float32 or not grad.is_contiguous() or grad.shape != x.shape:
        raise ValueError(f"grad is {grad.dtype} {list(grad.shape)}; it must be contiguous float32 {list(x.shape)}")


def check_output(y: Tensor) -> None:
    """Raise ValueError for a product that scales can't be written onto."""
    if not y.is_contiguous():
        raise ValueError(f"y has strides {y.stride()}; it must be contiguous")


def _scale_output_fake(y: Tensor, *others: Tensor | None) -> None:
    del y, others


def _scale_gradient_fake(
    grad: Tensor,
    row_scale: Tensor,  # noqa: ARG001
    column_scale: Tensor,  # noqa: ARG001
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    return grad.new_empty(grad.shape, dtype=dtype), grad.new_empty(grad.shape, dtype=dtype)


for _schema in SCHEMAS:
    _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))
for _name, _fake in {
    "quantize_rows": _quantize_rows_fake,
    "row_scales": _row_scales_fake,
    "quantize_rows_backward": _backward_fake,
    "scale_output": _scale_output_fake,
    "scale_gradient": _scale_gradient_fake,
}.items():
    torch.library.register_fake(f"qvgen::{_name}", _fake, lib=_library)
