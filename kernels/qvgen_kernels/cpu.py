"""CPU backends amx, vnni, avx2, neon and portable: torch-free C++ (csrc/cpu), built at first use.

One call quantizes rows, multiplies integers and scales the sums, block by block, so that the codes of a block never leave the
cache. Everything but the integer product is the same source for all backends (csrc/cpu/body.inl), so they agree to the bit.

The packed weight is described in :mod:`qvgen_kernels.cpu_prepack`. Threads are torch's own (``torch.set_num_threads``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional

from qvgen_kernels.contract import LinearSpec, LinearTensors
from qvgen_kernels.cpu_library import BACKENDS, CLinear, library, supported
from qvgen_kernels.cpu_prepack import arrange, padded_sizes
from qvgen_kernels.errors import KernelUnavailableError
from qvgen_kernels.hadamard import paley_factor, paley_signs
from qvgen_kernels.registry import register_backend
from qvgen_kernels.weight import CanonicalPrepack, CanonicalWeight

__all__ = ["CpuBackend", "probe"]

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_FUNCTIONS = {"none": 0, "gelu_tanh": 1, "silu": 2}
_SCALE_DTYPES = {"float32": 0, "bfloat16": 1, "float16": 2}
_ARITHMETICS = {"reciprocal": 0, "division": 1, "unrounded": 2}


class CpuBackend(CanonicalPrepack):
    """One kernel name of the CPU library.

    Args:
        name: What a user writes as ``kernel=name``.
        priority: "auto" prefers the larger.
        variants: Backends of the library, best first; the first that the CPU runs is taken.
        k_unit: A group of columns is padded to a multiple of this.
    """

    device_types = ("cpu",)

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
        raise KernelUnavailableError(f"kernel={self.name!r}: {supported(self.variants[-1])}; use kernel=auto")

    def _arrange(self, parts: Sequence[CanonicalWeight], *, spec: LinearSpec) -> list[Tensor]:
        """Unpack the codes, subtract what fits the operand, and bring them into the order of the products."""
        # All backends write the same bytes; so a weight can be made where only another machine can use it.
        runs_here = [name for name in self.variants if supported(name) is None]
        return arrange(parts, spec=spec, k_unit=self.k_unit, backend=BACKENDS[(*runs_here, "portable")[0]])

    def linear(self, x: Tensor, weight: Sequence[Tensor], *, tensors: LinearTensors, spec: LinearSpec) -> Tensor:
        """Map x [M, K] to [M, N] of x's dtype; inputs as the operator has checked them."""
        y = x.new_empty(x.shape[0], spec.out_features)
        call, keep = _call(x, weight, tensors, spec=spec, k_unit=self.k_unit)
        call.backend, call.y = BACKENDS[self.variant()], y.data_ptr()
        _run(call)
        del keep
        return y


@lru_cache(maxsize=64)
def _paley_terms(b: int) -> Tensor:
    """uint8 [b/4, b]: which of the 16 signed sums of inputs 4j .. 4j+3 output i takes (first sign is the highest bit)."""
    negative = (torch.tensor(paley_signs(b), device="cpu") < 0).long()  # whatever the default device is
    weights = torch.tensor([8, 4, 2, 1], device="cpu")
    return (negative.unflatten(1, (-1, 4)) * weights).sum(-1).t().contiguous().to(torch.uint8)


@lru_cache(maxsize=1024)
def _template(spec: LinearSpec, k_unit: int) -> tuple[CLinear, Tensor | None]:
    """The part of a call's structure that the spec decides, and the table that it points into."""
    padded_group, padded_out = padded_sizes(spec, k_unit)
    regular = spec.rotation_kind == "regular"
    paley = (0 if regular else paley_factor(spec.rotation)) if spec.rotation else 1
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
        arithmetic=_ARITHMETICS[spec.activation_arithmetic],
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
    """Compute what a call computes on its way, for holding a backend to the reference with ``torch.equal``.

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
