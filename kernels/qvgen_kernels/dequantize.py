r"""Backend ``dequantize``: the packed linear by the device's own floating-point product, on any device that torch knows.

    y[m,n] = (sum_k T(2^-a a[m,k]) T(2^-b w[n,k])) * (2^a s_x[m]) * (2^b s_w[n])     T: x's dtype

The codes are the contract's: inputs go through the reference's quantizer. What follows is the floating-point layer, with the
weight of one layer at a time brought to T from planes that stay packed: canonical bytes are all that is kept.

Operands are whole where they can be. A side without groups keeps its integers q - z (at most 255, which bfloat16 holds) and
is scaled after the product; so only the product's sums are rounded. A side with groups carries scale / (its row's largest
scale), and a real zero point is subtracted: those operands are rounded to T. The powers of two keep float16 sums below 65504;
they are 1 for other dtypes. How far outputs may be from the reference's stands in kernels/README.md.

Leaves out: any gain in speed over the floating-point layer. It takes its time and that of unpacking.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from qvgen_kernels.contract import LinearSpec, LinearTensors
from qvgen_kernels.reference import finish, low_rank_branch, quantize_activations, without_autocast
from qvgen_kernels.registry import register_backend
from qvgen_kernels.weight import CanonicalPrepack, CanonicalWeight, unpack_planes

__all__ = ["DequantizeBackend"]

BLOCK = 2**24
"""Elements of a float32 intermediate (64 MiB); rows of inputs and of weights are taken in blocks of that size."""

FLOAT16_SUM = 2**15
"""Largest magnitude of a float16 sum, half of what the type holds."""

_PER_ROW = ("clip_low", "clip_high", "row_scale", "row_zero_point", "residual")


class DequantizeBackend(CanonicalPrepack):
    """The prepacked weight is the list of the parts' tensors as they lie: planes, scale and zero point of each, no copy."""

    name = "dequantize"
    priority = 5
    priority_on_cpu = -1
    exact = False
    cost = "about bfloat16's time plus unpacking, packed memory; outputs within a rounding of the integer kernels'"

    def refusal(self, spec: LinearSpec, *, device: torch.device) -> str | None:  # noqa: ARG002
        """Refuse nothing: it takes operators that every device has."""
        return None

    def _arrange(self, parts: Sequence[CanonicalWeight], *, spec: LinearSpec) -> list[Tensor]:  # noqa: ARG002
        return [
            tensor
            for planes, scale, zero_point in parts
            for tensor in (*planes, scale, *([] if zero_point is None else [zero_point]))
        ]

    def linear(self, x: Tensor, weight: Sequence[Tensor], *, tensors: LinearTensors, spec: LinearSpec) -> Tensor:
        """Map x [M, K] to [M, N] of x's dtype; inputs as the operator has checked them."""
        parts = _parts(weight, spec)
        shift = _shift(spec) if x.dtype == torch.float16 else 0
        y = x.new_empty(x.shape[0], spec.out_features)
        step = max(1, BLOCK // max(spec.in_features, spec.out_features))
        with without_autocast(x.device):
            operand, factor = _weight_operand(parts, spec=spec, dtype=x.dtype, shift=shift - shift // 2)
            for start in range(0, len(x), step):
                rows = slice(start, start + step)
                given = _rows_of(tensors, rows, count=len(x))
                y[rows] = _rows(x[rows], operand, factor, tensors=given, spec=spec, shift=shift // 2)
        return y


def _parts(weight: Sequence[Tensor], spec: LinearSpec) -> list[CanonicalWeight]:
    """The layers that a prepacked list is of.

    Raises:
        ValueError: It is no list that prepack returned for this spec.
    """
    planes = 2 if spec.weight_bits == 3 else 1
    size = planes + 1 + (spec.weight_zero_point != "none")
    rows = sum(tensor.shape[0] for tensor in weight[::size])
    if len(weight) % size or rows != spec.out_features or weight[planes].dtype != torch.float32:
        raise ValueError(
            f"weight is {[(tensor.dtype, list(tensor.shape)) for tensor in weight]}; it must be what prepack returned for "
            f"[{spec.out_features}, {spec.in_features}], with torch.float32 scales"
        )
    return [
        CanonicalWeight(
            weight[first : first + planes],
            weight[first + planes],
            None if spec.weight_zero_point == "none" else weight[first + planes + 1],
        )
        for first in range(0, len(weight), size)
    ]


def _shift(spec: LinearSpec) -> int:
    """The power of two that sums of whole operands are divided by so that float16 holds them."""
    bound = spec.accumulator_bound * spec.num_groups
    return max(0, math.ceil(math.log2(bound / FLOAT16_SUM)))


def _weight_operand(
    parts: Sequence[CanonicalWeight], *, spec: LinearSpec, dtype: torch.dtype, shift: int
) -> tuple[Tensor, Tensor]:
    """The weight as an operand [N, K] of ``dtype``, and what its rows' sums are multiplied by, float32 [N]."""
    operand = parts[0].scale.new_empty(spec.out_features, spec.in_features, dtype=dtype)
    factors, first = [], 0
    for planes, scale, zero_point in parts:
        grouped = scale.reshape(len(scale), -1, 1)
        zeros = 2.0 ** (spec.weight_bits - 1) if zero_point is None else zero_point.reshape(grouped.shape).float()
        largest = grouped.amax(1)
        share = grouped / largest.unsqueeze(-1) if spec.weight_group_size else None
        factors.append(largest.squeeze(-1) * 2.0**shift)
        step = max(1, BLOCK // spec.in_features)
        for start in range(0, len(scale), step):
            rows = slice(start, start + step)
            codes = _codes(planes, rows, spec=spec).float().unflatten(-1, (grouped.shape[1], -1))
            values = codes.sub_(zeros if isinstance(zeros, float) else zeros[rows])
            values = values if share is None else values.mul_(share[rows])
            operand[first + start : first + start + len(codes)] = values.mul_(2.0**-shift).flatten(1)
        first += len(scale)
    return operand, torch.cat(factors)


def _codes(planes: Sequence[Tensor], rows: slice, *, spec: LinearSpec) -> Tensor:
    return unpack_planes([plane[rows] for plane in planes], spec=spec)


def _rows(x: Tensor, weight: Tensor, factor: Tensor, *, tensors: LinearTensors, spec: LinearSpec, shift: int) -> Tensor:
    """The outputs [m, N] of a block of rows."""
    operand, scale, _ = quantize_activations(x, spec=spec, tensors=tensors)
    largest = scale.amax(-1, keepdim=True)
    if spec.activation_group_size:
        operand.mul_((scale / largest).unsqueeze(-1))
    sums = operand.flatten(1).mul_(2.0**-shift).to(x.dtype) @ weight.t()
    y = sums.float().mul_(largest * 2.0**shift).mul_(factor)
    if spec.branch_rank:
        y.add_(low_rank_branch(x, tensors))
    if tensors.bias is not None:
        y.add_(tensors.bias)
    return finish(y.to(x.dtype), tensors=tensors, spec=spec)


def _rows_of(tensors: LinearTensors, rows: slice, *, count: int) -> LinearTensors:
    """The tensors of a block of rows, from those of all ``count`` rows."""
    given = {name: None if (value := getattr(tensors, name)) is None else value[rows] for name in _PER_ROW}
    gate = tensors.gate
    if gate is not None and len(gate) > 1:
        indices = torch.arange(count, device=gate.device)[rows]
        gate = gate[indices.div(count // len(gate), rounding_mode="floor")]
    return tensors._replace(gate=gate, **given)


register_backend(DequantizeBackend())
