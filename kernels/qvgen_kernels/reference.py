r"""Exact reference of the packed linear in plain torch: every backend's oracle, and what runs without one.

    q_x, s_x, z_x = quantize(H x)                        float32, per token or group (kernels/README.md)
    acc[m,n,g]    = sum_{k in g} (q_x - z_x)(q_w - z_w)   exact integers
    y[m,n]        = sum_g (float32(acc) * s_x) * s_w + (x down^T) up^T + bias
    result        = residual + gate * f(y), as torch's separate operators round

Exact integers from float matrix products. The operands are whole numbers, and ``spec.accumulator_bound``
bounds the sum of the |products| of one output element, hence every partial sum in ANY order of summation.
Whole numbers up to 2^24 are float32 numbers, so while the bound is <= 2^24 no addition of a float32 product
rounds (a fused multiply-add, a blocked or threaded sum neither). Operands are at most 255, which even
bfloat16 holds: torch's reduced-precision modes for float32 products on CPU change nothing. Beyond 2^24, and
on GPUs (whose TF32 modes are not ours to reason about), float64 does the same up to 2^53. That is why a row's
result depends neither on its batch mates nor on the number of threads, though BLAS chooses its own order; the
rest is elementwise or row-wise.

Non-finite rows need no branch: a NaN or infinity in x[m] makes s_x[m] infinite or NaN and some q_x[m] NaN,
and the products spread it over row m and no other. Leaves out: speed beyond what BLAS gives.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from qvgen_kernels.contract import SCALE_FLOOR, SPAN_FLOOR, LinearSpec, LinearTensors
from qvgen_kernels.hadamard import block_hadamard
from qvgen_kernels.registry import register_backend
from qvgen_kernels.weight import CanonicalPrepack, CanonicalWeight, unpack_planes

__all__ = ["ReferenceBackend", "accumulate", "block_hadamard", "quantize_activations"]

_NOTHING = LinearTensors()

FLOAT32_EXACT = 2**24
"""Every whole number up to here, in magnitude, is a float32."""


def quantize_activations(
    x: Tensor, *, spec: LinearSpec, tensors: LinearTensors = _NOTHING
) -> tuple[Tensor, Tensor, Tensor]:
    """Smooth, rotate and quantize rows of x on the fly.

    Args:
        x: float32, bfloat16 or float16 [M, K].
        spec: the layer.
        tensors: clips, input_scale, and row_scale and row_zero_point where ranges are static.

    Returns:
        operand: float32 [M, G, K/G], whole numbers q - z (G activation groups, 1 per token).
        scale: float32 [M, G].
        zero_point: float32 [M, G], whole numbers; zeros where symmetric. Rows that are not finite hold NaNs.
    """
    rows = x.to(torch.float32)
    rows = rows if tensors.input_scale is None else rows * tensors.input_scale
    if spec.rotation:
        rows = block_hadamard(rows, block=spec.rotation, kind=spec.rotation_kind)
    rows = rows.unflatten(-1, (-1, spec.activation_group_size or spec.in_features))
    symmetric = spec.activation_zero_point == "none"
    scale, zero_point = (_static_qparams if spec.activation_range == "static" else _dynamic_qparams)(
        rows, spec=spec, tensors=tensors
    )
    codes = rows / scale if spec.activation_arithmetic == "division" else rows * (1.0 / scale)
    codes = codes.round_().add_(zero_point)
    codes = codes.clamp_(-spec.activation_qmax if symmetric else 0, spec.activation_qmax)
    if spec.activation_arithmetic == "unrounded":
        scale = _round_scale(scale, spec.scale_dtype)
    return codes.sub_(zero_point), scale.squeeze(-1), zero_point.squeeze(-1)


def _dynamic_qparams(rows: Tensor, *, spec: LinearSpec, tensors: LinearTensors) -> tuple[Tensor, Tensor]:
    """Scale and zero point [M, G, 1] of rows [M, G, K/G] from their own extremes."""
    clip_low, clip_high = tensors.clip_low, tensors.clip_high
    # A divisor on x's device: on CUDA torch multiplies by a Python number's reciprocal instead of dividing.
    qmax = rows.new_full((), spec.activation_qmax)
    low = rows.amin(-1, keepdim=True)
    high = rows.amax(-1, keepdim=True)
    if spec.activation_zero_point == "none":
        span = torch.maximum(-low, high)
        span = span if clip_high is None else span * clip_high.view(-1, 1, 1)
        scale = _symmetric_scale(span, qmax, spec=spec)
        return scale, torch.zeros_like(scale)
    low, high = low.clamp_(max=0.0), high.clamp_(min=0.0)
    low = low if clip_low is None else low * clip_low.view(-1, 1, 1)
    high = high if clip_high is None else high * clip_high.view(-1, 1, 1)
    scale = _round_scale((high - low) / qmax, spec.scale_dtype)
    return scale, (-low * (1.0 / scale)).round_().clamp_(0, spec.activation_qmax)


def _symmetric_scale(span: Tensor, qmax: Tensor, *, spec: LinearSpec) -> Tensor:
    """Scale that codes are made with: float32, not yet rounded to scale_dtype where the arithmetic is "unrounded"."""
    if spec.activation_arithmetic == "division":
        return span.clamp(min=SPAN_FLOOR) / qmax
    if spec.activation_arithmetic == "unrounded":
        return _round_scale(span * (1.0 / qmax), "float32")
    return _round_scale(span / qmax, spec.scale_dtype)


def _static_qparams(
    rows: Tensor,  # noqa: ARG001 - same signature as the dynamic ones
    *,
    spec: LinearSpec,
    tensors: LinearTensors,
) -> tuple[Tensor, Tensor]:
    """The given scale and zero point of every row, [M, 1, 1]."""
    assert tensors.row_scale is not None  # the operator has checked it
    scale = tensors.row_scale.view(-1, 1, 1)
    if tensors.row_zero_point is None or spec.activation_zero_point == "none":
        return scale, torch.zeros_like(scale)
    return scale, tensors.row_zero_point.view(-1, 1, 1)


def _round_scale(scale: Tensor, dtype: str) -> Tensor:
    scale = scale.clamp_(min=SCALE_FLOOR["float32"])
    if dtype == "float32":
        return scale
    # Saturate instead of overflowing: a huge row stays finite. But a row with a NaN or infinity stays NaN.
    rounded = scale.to(getattr(torch, dtype)).to(torch.float32)
    rounded = rounded.clamp_(min=SCALE_FLOOR[dtype], max=torch.finfo(getattr(torch, dtype)).max)
    return torch.where(scale.isfinite(), rounded, math.nan)


def _matmul_exact(operand: Tensor, weight: Tensor, *, spec: LinearSpec) -> Tensor:
    """Operand [M, k] (whole numbers) times weight [N, k] transposed, exact float32 or float64 [M, N]."""
    small = spec.accumulator_bound <= FLOAT32_EXACT and operand.device.type == "cpu"
    dtype = torch.float32 if small else torch.float64
    return operand.to(dtype) @ weight.to(dtype).t()


def accumulate(operand: Tensor, weight: Sequence[Tensor], *, spec: LinearSpec) -> Tensor:
    """Integer accumulators, for holding another backend to the reference with ``torch.equal``.

    Args:
        operand: float32 [M, G, K/G] from :func:`quantize_activations`.
        weight: what :meth:`ReferenceBackend.prepack` returned.
        spec: the layer.

    Returns:
        int32 [M, N, spec.num_groups]; rows that are not finite hold zeros.
    """
    operand = operand.flatten(1).nan_to_num(0.0, posinf=0.0, neginf=0.0)
    sums = [_matmul_exact(operand[:, k], weight[0][:, k], spec=spec) for k in _group_slices(spec)]
    return torch.stack(sums, -1).to(torch.int32)


def _group_slices(spec: LinearSpec) -> list[slice]:
    return [slice(start, start + spec.group_size) for start in range(0, spec.in_features, spec.group_size)]


class ReferenceBackend(CanonicalPrepack):
    """Runs everywhere and every spec. Prepacked weight: [operand, scale] plus [zero_point] where it is real.

    operand is int8 [N, K] (int16 for 8-bit integer zero points, uint8 raw codes for real ones): one byte per
    weight, widened per call. scale and zero_point are float32 [N, Gw].
    """

    name = "reference"
    priority = 0
    cost = "an exact oracle, many times bfloat16's time (weights widened on each call, on a GPU to float64), a byte a weight"

    def refusal(self, spec: LinearSpec, *, device: torch.device) -> str | None:  # noqa: ARG002
        """Every spec runs on every device that has float64."""
        return None if _has_float64(device) else f"it multiplies in float64, which {device.type} does not have"

    def _arrange(self, parts: Sequence[CanonicalWeight], *, spec: LinearSpec) -> list[Tensor]:
        """Unpack the codes and subtract integer zero points in the operand."""
        arranged = [self._arrange_part(part, spec=replace(spec, out_features=len(part.scale))) for part in parts]
        return [torch.cat(tensors) for tensors in zip(*arranged, strict=True)] if len(parts) > 1 else arranged[0]

    def _arrange_part(self, part: CanonicalWeight, *, spec: LinearSpec) -> list[Tensor]:
        planes, scale, zero_point = part
        codes = unpack_planes(planes, spec=spec)
        scale = scale.reshape(spec.out_features, -1).clone()
        if spec.weight_zero_point == "real":
            assert zero_point is not None  # check_weight
            return [codes, scale, zero_point.reshape(spec.out_features, -1).clone()]
        if spec.weight_zero_point == "none":
            return [(codes.to(torch.int16) - 2 ** (spec.weight_bits - 1)).to(torch.int8), scale]
        assert zero_point is not None  # check_weight
        columns = codes.to(torch.int16).reshape(spec.out_features, spec.num_weight_groups, -1)
        operand = (columns - zero_point.reshape(spec.out_features, -1, 1)).flatten(1)
        return [operand if spec.weight_bits == 8 else operand.to(torch.int8), scale]

    def linear(self, x: Tensor, weight: Sequence[Tensor], *, tensors: LinearTensors, spec: LinearSpec) -> Tensor:
        """Map x [M, K] to [M, N] of x's dtype; inputs as the operator has checked them."""
        # module.to(torch.bfloat16) also casts buffers: coarser scales would be another network, silently.
        if weight[0].shape != (spec.out_features, spec.in_features) or weight[1].dtype != torch.float32:
            raise ValueError(
                f"weight is {weight[0].dtype} {list(weight[0].shape)} with {weight[1].dtype} scales; it must be "
                f"what prepack returned for [{spec.out_features}, {spec.in_features}], with torch.float32 scales"
            )
        with without_autocast(x.device):
            operand, scale, _ = quantize_activations(x, spec=spec, tensors=tensors)
            flat = operand.flatten(1)
            y: Tensor | None = None
            for group, columns in enumerate(_group_slices(spec)):
                acc = _matmul_exact(flat[:, columns], weight[0][:, columns], spec=spec).to(torch.float32)
                w = min(group, weight[1].shape[1] - 1)
                if spec.weight_zero_point == "real":
                    # Exact as long as float64 holds it; one rounding to float32, as from an int32 sum.
                    rowsum = flat[:, columns].sum(-1, keepdim=True, dtype=torch.float64).to(torch.float32)
                    acc -= rowsum * weight[2][:, w]
                acc.mul_(scale[:, min(group, scale.shape[1] - 1), None]).mul_(weight[1][:, w])
                y = acc if y is None else y.add_(acc)
            assert y is not None  # there is one group at least
            if spec.branch_rank:
                y.add_(low_rank_branch(x, tensors))
            if tensors.bias is not None:
                y.add_(tensors.bias)
            return finish(y.to(x.dtype), tensors=tensors, spec=spec)


def finish(y: Tensor, *, tensors: LinearTensors, spec: LinearSpec) -> Tensor:
    """Function, gate and residual of outputs [M, N] by torch's operators; they round where these do."""
    dtype = y.dtype
    if spec.function == "gelu_tanh":
        y = functional.gelu(y, approximate="tanh")
    elif spec.function == "silu":
        y = functional.silu(y)
    if tensors.gate is not None and len(y):
        y = (y.unflatten(0, (len(tensors.gate), -1)) * tensors.gate.unsqueeze(1)).flatten(0, 1)
    if tensors.residual is not None:
        y = tensors.residual + y  # float32 where the gate is
    return y.to(dtype).contiguous()  # as of any layer, however the residual lies


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """No autocast on that device, which would round float32 sums to bfloat16; nothing where a device has none."""
    available = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if available else nullcontext()


def _has_float64(device: torch.device) -> bool:
    if device.type == "xpu" and torch.xpu.is_available():
        return bool(torch.xpu.get_device_properties(device).has_fp64)
    return device.type in ("cpu", "cuda", "meta")  # one that is not known is taken not to


def low_rank_branch(x: Tensor, tensors: LinearTensors) -> Tensor:
    """(x down^T) up^T of x [M, K] in x's dtype, as float32 [M, N]."""
    down, up = tensors.branch_down, tensors.branch_up
    assert down is not None  # the operator has checked both
    assert up is not None
    return functional.linear(functional.linear(x, down.to(x.dtype)), up.to(x.dtype)).to(torch.float32)


register_backend(ReferenceBackend())
