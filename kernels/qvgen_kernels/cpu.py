"""CPU backends amx, vnni, avx2, neon and portable: torch-free C++ (csrc/cpu), built at first use.

One call quantizes rows, multiplies integers and scales the sums, block by block, so that the codes of a block never leave the
cache. Everything but the integer product is the same source for all backends (csrc/cpu/body.inl), so they agree to the bit.

Packed weight, the list that ``prepack`` returns (padded to K' columns and N' outputs, csrc/cpu/qv.h):

    int8 [N'/16, K'/4, 16, 4]   operands q - base; base = integer zero point up to 7 bits, 2^(bits-1) where symmetric, 0 where
                                real, 128 for 8-bit codes with a zero point (they would not fit a signed byte)
    int32 [G, N']               their sums over each group of columns
    float32 [Gw, N']            scales
    float32 [Gw, N']            real zero points, where they are real
    int32 [Gw, N']              base - zero point, where base is 128

The product is corrected in int32 by what was left out, which is exact. Threads are torch's own (``torch.set_num_threads``).
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional

from qvgen_kernels.contract import LinearSpec, LinearTensors
from qvgen_kernels.cpu_library import BACKENDS, CLinear, library, supported
from qvgen_kernels.hadamard import paley_factor, paley_signs
from qvgen_kernels.registry import register_backend
from qvgen_kernels.weight import check_weight

__all__ = ["CpuBackend", "probe"]

BLOCK = 32
"""Outputs are padded to a multiple of this."""

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_FUNCTIONS = {"none": 0, "gelu_tanh": 1, "silu": 2}
_SCALE_DTYPES = {"float32": 0, "bfloat16": 1, "float16": 2}


class CpuBackend:
    """One kernel name of the CPU library.

    Args:
        name: What a user writes as ``kernel=name``.
        priority: "auto" prefers the larger.
        variants: Backends of the library, best first; the first that the CPU runs is taken.
        k_unit: A group of columns is padded to a multiple of this.
    """

    def __init__(self, name: str, *, priority: int, variants: Sequence[str], k_unit: int) -> None:
        self.name, self.priority, self.variants, self.k_unit = name, priority, variants, k_unit

    def refusal(self, spec: LinearSpec, *, device: torch.device) -> str | None:  # noqa: ARG002 - every spec runs
        """Why this machine does not run the backend; the library is built here if it has to be."""
        if device.type != "cpu":
            return f"kernel={self.name} runs on the CPU, not on {device}"
        reasons = [supported(variant) for variant in self.variants]
        return None if None in reasons else reasons[-1]

    def variant(self) -> str:
        """The backend of the library that runs here.

        Raises:
            RuntimeError: none does.
        """
        for name in self.variants:
            if supported(name) is None:
                return name
        raise RuntimeError(f"kernel={self.name!r}: {supported(self.variants[-1])}; use kernel=auto")

    def prepack(
        self, planes: Sequence[Tensor], *, scale: Tensor, zero_point: Tensor | None, spec: LinearSpec
    ) -> list[Tensor]:
        """Unpack the codes, subtract what fits the operand, and bring them into the order of the products.

        Raises:
            ValueError: as :func:`check_weight`.
        """
        check_weight(planes, scale=scale, zero_point=zero_point, spec=spec)
        groups, outputs = spec.num_weight_groups, spec.out_features
        padded_group, padded_out = _padded(spec, self.k_unit)
        low, high = planes[0].contiguous(), planes[-1].contiguous()
        base = low.new_full((outputs, groups), _base(spec), dtype=torch.int32)
        if spec.weight_zero_point == "integer" and spec.weight_bits < 8:
            assert zero_point is not None  # check_weight
            base = zero_point.reshape(outputs, groups).to(torch.int32).contiguous()
        packed = low.new_empty(padded_out // 16, spec.num_groups * padded_group // 4, 16, 4, dtype=torch.int8)
        column_sum = low.new_empty(spec.num_groups, padded_out, dtype=torch.int32)
        sizes = (spec.weight_bits, outputs, spec.in_features, spec.group_size, padded_group, padded_out, groups)
        library().qv_pack(
            low.data_ptr(),
            high.data_ptr(),
            base.data_ptr(),
            (ctypes.c_int64 * 9)(*sizes, low.shape[1], high.shape[1]),
            packed.data_ptr(),
            column_sum.data_ptr(),
        )
        weight = [packed, column_sum, _by_output(scale, spec, padded_out)]
        if spec.weight_zero_point == "real":
            assert zero_point is not None  # check_weight
            weight.append(_by_output(zero_point, spec, padded_out))
        if spec.weight_bits == 8 and spec.weight_zero_point != "none":
            zero = torch.zeros_like(base) if zero_point is None or zero_point.is_floating_point() else zero_point
            weight.append(_by_output(128 - zero.to(torch.int32), spec, padded_out))
        return weight

    def linear(self, x: Tensor, weight: Sequence[Tensor], *, tensors: LinearTensors, spec: LinearSpec) -> Tensor:
        """Map x [M, K] to [M, N] of x's dtype; inputs as the operator has checked them."""
        y = x.new_empty(x.shape[0], spec.out_features)
        call, keep = _call(x, weight, tensors, spec=spec, k_unit=self.k_unit)
        call.backend, call.y = BACKENDS[self.variant()], y.data_ptr()
        _run(call)
        del keep
        return y


def _base(spec: LinearSpec) -> int:
    """What is subtracted from every code where it is one number for the whole layer."""
    if spec.weight_zero_point == "none":
        return int(2 ** (spec.weight_bits - 1))
    return 128 if spec.weight_bits == 8 else 0


def _padded(spec: LinearSpec, k_unit: int) -> tuple[int, int]:
    """Columns of a group and outputs, as they are stored."""
    return -(-spec.group_size // k_unit) * k_unit, -(-spec.out_features // BLOCK) * BLOCK


def _by_output(values: Tensor, spec: LinearSpec, padded_out: int) -> Tensor:
    """Values [N] or [N, Gw] as contiguous [Gw, N'], zeros after N."""
    columns = values.reshape(spec.out_features, -1).t()
    padded = columns.new_zeros(columns.shape[0], padded_out)
    padded[:, : spec.out_features] = columns
    return padded


@lru_cache(maxsize=64)
def _paley_terms(b: int) -> Tensor:
    """uint8 [b/4, b]: which of the 16 signed sums of inputs 4j .. 4j+3 output i takes (first sign is the highest bit)."""
    negative = (torch.tensor(paley_signs(b), device="cpu") < 0).long()  # whatever the default device is
    weights = torch.tensor([8, 4, 2, 1], device="cpu")
    return (negative.unflatten(1, (-1, 4)) * weights).sum(-1).t().contiguous().to(torch.uint8)


@lru_cache(maxsize=1024)
def _template(spec: LinearSpec, k_unit: int) -> tuple[CLinear, Tensor | None]:
    """All of a call that the spec decides, and the table that it points into."""
    padded_group, padded_out = _padded(spec, k_unit)
    paley = paley_factor(spec.rotation) if spec.rotation else 1
    terms = _paley_terms(paley) if paley > 1 else None
    eight = spec.weight_bits == 8 and spec.weight_zero_point != "none"
    filled = CLinear(
        in_features=spec.in_features,
        out_features=spec.out_features,
        padded_in=spec.num_groups * padded_group,
        padded_out=padded_out,
        group=spec.group_size,
        groups=spec.num_groups,
        padded_group=padded_group,
        weight_groups=spec.num_weight_groups,
        activation_groups=spec.in_features // (spec.activation_group_size or spec.in_features),
        rotation=spec.rotation,
        paley=paley,
        paley_terms=None if terms is None else terms.data_ptr(),
        rotation_scale=1.0 / math.sqrt(spec.rotation) if spec.rotation else 1.0,
        y_row_stride=spec.out_features,
        activation_qmax=spec.activation_qmax,
        symmetric=int(spec.activation_zero_point == "none"),
        activation_bits=spec.activation_bits,
        scale_dtype=_SCALE_DTYPES[spec.scale_dtype],
        function=_FUNCTIONS[spec.function],
        weight_bound=128 if eight else spec.weight_operand_bound,
    )
    return filled, terms


def _call(
    x: Tensor, weight: Sequence[Tensor], tensors: LinearTensors, *, spec: LinearSpec, k_unit: int
) -> tuple[CLinear, list[Tensor | None]]:
    """A filled structure without backend and output, and the tensors that it points into."""
    template, terms = _template(spec, k_unit)
    call = CLinear.from_buffer_copy(template)
    shape = (call.padded_out // 16, call.padded_in // 4, 16, 4)
    if weight[0].shape != shape or weight[0].dtype != torch.int8 or weight[2].dtype != torch.float32:
        raise ValueError(
            f"weight is {weight[0].dtype} {list(weight[0].shape)} with {weight[2].dtype} scales; it must be what prepack "
            f"returned for [{spec.out_features}, {spec.in_features}]: torch.int8 {list(shape)} with torch.float32 scales"
        )
    keep: list[Tensor | None] = [x, *weight, terms]
    call.rows, call.dtype = x.shape[0], DTYPES[x.dtype]
    call.x, call.x_row_stride, call.x_column_stride = x.data_ptr(), x.stride(0), x.stride(1)
    call.weight, call.column_sum, call.weight_scale = (tensor.data_ptr() for tensor in weight[:3])
    extra = list(weight[3:])
    if spec.weight_zero_point == "real":
        call.weight_zero = extra.pop(0).data_ptr()
    if extra:
        call.weight_shift = extra.pop(0).data_ptr()
    vectors = {name: getattr(tensors, name) for name in ("bias", "clip_low", "clip_high", "input_scale", "row_scale")}
    vectors |= {"row_zero": tensors.row_zero_point, "branch": _branch(x, tensors) if spec.branch_rank else None}
    for name, tensor in vectors.items():
        if tensor is not None:
            keep.append(dense := tensor.contiguous())
            setattr(call, name, dense.data_ptr())
    if tensors.gate is not None:
        keep.append(gate := _dense_rows(tensors.gate))
        call.gate, call.gate_row_stride = gate.data_ptr(), gate.stride(0)
        call.gate_rows, call.gate_float32 = len(x) // max(1, len(gate)), int(gate.dtype == torch.float32)
    if tensors.residual is not None:
        keep.append(residual := _dense_rows(tensors.residual))
        call.residual, call.residual_row_stride = residual.data_ptr(), residual.stride(0)
    call.threads = torch.get_num_threads()
    return call, keep


def _dense_rows(rows: Tensor) -> Tensor:
    """Rows whose columns lie side by side; a view where they do."""
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _branch(x: Tensor, tensors: LinearTensors) -> Tensor:
    """(x down^T) up^T in x's dtype [M, N], as the reference computes it; the library adds it to the sums."""
    assert tensors.branch_down is not None  # the operator has checked both
    assert tensors.branch_up is not None
    # An autocast region would compute float32 inputs in bfloat16.
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        return functional.linear(functional.linear(x, tensors.branch_down.to(x.dtype)), tensors.branch_up.to(x.dtype))


def _run(call: CLinear) -> None:
    status = library().qv_linear(call)
    if status == 2:
        raise MemoryError(f"no memory for {call.rows} rows of {call.in_features} columns; call with fewer rows")
    assert status == 0, f"backend {call.backend} is not in the library"


def probe(
    x: Tensor, weight: Sequence[Tensor], *, tensors: LinearTensors, spec: LinearSpec, variant: str, k_unit: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What a call computes on its way, for holding a backend to the reference with ``torch.equal``.

    Args:
        x: float32, bfloat16 or float16 [M, K].
        weight: what a prepack with the same ``k_unit`` returned.
        tensors: bias, clips, static ranges, branch.
        spec: the layer.
        variant: a backend of the library (:data:`~qvgen_kernels.cpu_library.BACKENDS`).
        k_unit: columns are padded to it.

    Returns:
        operands int16 [M, K] (q - z), scales float32 [M, Ga], accumulators int32 [M, N, G], y [M, N].
    """
    y = x.new_empty(x.shape[0], spec.out_features)
    call, keep = _call(x, weight, tensors, spec=spec, k_unit=k_unit)
    operands = x.new_empty(x.shape, dtype=torch.int16)
    scales = x.new_empty(x.shape[0], call.activation_groups, dtype=torch.float32)
    accumulators = x.new_empty(x.shape[0], spec.out_features, spec.num_groups, dtype=torch.int32)
    call.backend, call.y = BACKENDS[variant], y.data_ptr()
    call.operands, call.scales = operands.data_ptr(), scales.data_ptr()
    call.accumulators = accumulators.data_ptr()
    _run(call)
    # y of an ordinary call: backends have shorter ways where nobody asks for accumulators.
    call.operands = call.scales = call.accumulators = None
    y.zero_()
    _run(call)
    del keep
    return operands, scales, accumulators, y


for _backend in (
    CpuBackend("amx", priority=50, variants=("amx",), k_unit=64),
    CpuBackend("vnni", priority=40, variants=("vnni",), k_unit=4),
    CpuBackend("avx2", priority=30, variants=("avxvnni", "avx2"), k_unit=4),
    CpuBackend("neon", priority=20, variants=("neon",), k_unit=4),
    CpuBackend("portable", priority=10, variants=("portable",), k_unit=4),
):
    register_backend(_backend)
