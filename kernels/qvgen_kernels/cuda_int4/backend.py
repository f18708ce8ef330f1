"""The backend of 4-bit tensor cores: what it refuses, its packed weight, its two launches.

The packed weight, with K padded to K', a multiple of 128, by codes 0:

    uint8 [N, K'/2]     raw codes, two in a byte, the even column low: the canonical plane itself for 4 bits and K' = K
    float32 [Gw, N]     scales
    int32 or float32 [Gw, N]   zero points: whole ones (2^(bits-1) where symmetric), or real ones
    int32 [G, N]        sums of the codes of every group

Widths of 2 and 3 bits take half a byte a weight here too. Zero points correct the sums in int32 (csrc/cuda/int4.h).
The input's rotation is torch's, of the reference, before the first launch.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from qvgen_kernels.contract import LinearSpec, LinearTensors
from qvgen_kernels.cpu_build import BuildError
from qvgen_kernels.cuda_int4.build import find_nvcc
from qvgen_kernels.cuda_int4.driver import launch
from qvgen_kernels.cuda_int4.structures import (
    TILE,
    CMultiply,
    CQuantize,
    multiply_shared_bytes,
    quantize_shared_bytes,
)
from qvgen_kernels.hadamard import block_hadamard
from qvgen_kernels.weight import CanonicalPrepack, CanonicalWeight, unpack_planes

__all__ = ["CudaInt4Backend", "run"]

_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
_FUNCTIONS = {"none": 0, "gelu_tanh": 1, "silu": 2}
_SCALE_DTYPES = {"float32": 0, "bfloat16": 1, "float16": 2}
_ARITHMETICS = {"reciprocal": 0, "division": 1, "unrounded": 2}
_SHARED_BYTES = 48 << 10
_WIDEST = 4
"""Bits of a code that the tensor cores multiply."""

_STEP = 64
"""Columns of one instruction: groups hold whole ones."""


class Launch(Protocol):
    """The driver, or an emulation: it starts a kernel."""

    def __call__(
        self, device: torch.device, name: str, argument: ctypes.Structure, *, blocks: int, shared: int
    ) -> None:
        """Start a kernel on a device, as :func:`qvgen_kernels.cuda_int4.driver.launch` does."""


class CudaInt4Backend(CanonicalPrepack):
    """Kernel name ``cuda_int4``; it has run on no card yet. ``auto`` takes it behind ``triton``, before ``dequantize``."""

    name = "cuda_int4"
    priority = 6
    device_types = ("cuda",)

    def refusal(self, spec: LinearSpec, *, device: torch.device) -> str | None:
        """Why this layer can't run on this device; nothing is compiled to find out."""
        if (reason := refusal_of_spec(spec)) is not None:
            return reason
        if device.type != "cuda" or torch.version.cuda is None:
            return f"kernel=cuda_int4 runs on NVIDIA cards, not on {device}"
        if not torch.cuda.is_available():
            return "torch finds no CUDA device here"
        major, minor = torch.cuda.get_device_capability(device)
        if (major, minor) != (7, 5) and major != 8:
            return f"{torch.cuda.get_device_name(device)} (sm_{major}{minor}) has no 4-bit tensor cores; sm_75 and sm_8x do"
        try:
            find_nvcc()
        except BuildError as error:
            return str(error)
        return None

    def _arrange(self, parts: Sequence[CanonicalWeight], *, spec: LinearSpec) -> list[Tensor]:
        """Codes of half a byte, and what corrects their sums."""
        arranged = [_arrange_part(part, spec=replace(spec, out_features=len(part.scale))) for part in parts]
        if len(parts) == 1:
            return arranged[0]
        dimensions = (0, 1, 1, 1)
        return [torch.cat(tensors, dim) for tensors, dim in zip(zip(*arranged, strict=True), dimensions, strict=True)]

    def linear(self, x: Tensor, weight: Sequence[Tensor], *, tensors: LinearTensors, spec: LinearSpec) -> Tensor:
        """Map x [M, K] to [M, N] of x's dtype; inputs as the operator has checked them."""
        return run(x, weight, tensors=tensors, spec=spec, launch=launch)


def refusal_of_spec(spec: LinearSpec) -> str | None:
    """Why no card runs this layer in 4 bits; None: some do."""
    if spec.weight_bits > _WIDEST or spec.activation_bits > _WIDEST:
        return f"kernel=cuda_int4 multiplies codes of 2 to 4 bits, not w{spec.weight_bits}a{spec.activation_bits}"
    if spec.num_groups > 1 and spec.group_size % _STEP:
        return f"kernel=cuda_int4 takes groups of multiples of {_STEP} columns, not of {spec.group_size}"
    if quantize_shared_bytes(spec.in_features, _range_groups(spec)) > _SHARED_BYTES:
        return f"in_features={spec.in_features} is more than a block of kernel=cuda_int4 quantizes at once"
    return None


def run(
    x: Tensor, weight: Sequence[Tensor], *, tensors: LinearTensors, spec: LinearSpec, launch: Launch,
    probe: Callable[[CQuantize, CMultiply, dict[str, Tensor]], None] | None = None,
) -> Tensor:  # fmt: skip
    """Quantize x [M, K] and multiply; see :class:`CudaInt4Backend`.

    Args:
        x: The rows.
        weight: What prepack returned.
        tensors: As the operator has checked them.
        spec: The layer.
        launch: Starts a kernel.
        probe: Gets both arguments and the tensors between the launches; for tests.
    """
    _check_weight(weight, spec)
    y = x.new_empty(len(x), spec.out_features)
    if not len(x):
        return y
    keep: list[Tensor] = []  # until both kernels are on the stream, whose order frees memory
    quantized = _quantized(x, tensors, spec, keep=keep)
    first, between = quantized
    second = _product(x, weight, tensors, spec, between=between, y=y, keep=keep)
    if probe is not None:
        probe(first, second, between)
    name = _NAMES[torch.float32 if spec.rotation else x.dtype]
    shared = quantize_shared_bytes(spec.in_features, first.range_groups)
    launch(x.device, f"qv_quantize_{name}", first, blocks=len(x), shared=shared)
    kind = "multiply_groups" if spec.num_groups > 1 else "multiply"
    blocks = -(-len(x) // TILE) * -(-spec.out_features // TILE)
    launch(x.device, f"qv_{kind}_{_NAMES[x.dtype]}", second, blocks=blocks, shared=multiply_shared_bytes())
    return y


def _arrange_part(part: CanonicalWeight, *, spec: LinearSpec) -> list[Tensor]:
    codes, outputs = unpack_planes(part.planes, spec=spec), spec.out_features
    width = _padded(spec.in_features)
    if spec.weight_bits == _WIDEST and width == spec.in_features:
        packed = part.planes[0].contiguous()
    else:
        padded = functional.pad(codes, (0, width - spec.in_features))
        packed = (padded[:, ::2] | padded[:, 1::2] << 4).contiguous()
    sums = codes.unflatten(1, (spec.num_groups, -1)).sum(-1, dtype=torch.int32)
    scale = part.scale.reshape(outputs, -1)
    if part.zero_point is None:
        zero = torch.full_like(scale, 2 ** (spec.weight_bits - 1), dtype=torch.int32)
    else:
        kind = torch.float32 if spec.weight_zero_point == "real" else torch.int32
        zero = part.zero_point.reshape(outputs, -1).to(kind)
    return [packed, *(tensor.t().clone(memory_format=torch.contiguous_format) for tensor in (scale, zero, sums))]


def _quantized(
    x: Tensor, tensors: LinearTensors, spec: LinearSpec, *, keep: list[Tensor]
) -> tuple[CQuantize, dict[str, Tensor]]:
    """The first launch's argument, and what it writes."""
    input_scale = tensors.input_scale
    rows = x
    if spec.rotation:
        rows = x.float() if input_scale is None else x.float() * input_scale
        rows, input_scale = block_hadamard(rows, block=spec.rotation, kind=spec.rotation_kind), None
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    keep.append(rows)
    count, device = len(x), x.device
    made = {
        "codes": torch.empty(count, _padded(spec.in_features) // 2, dtype=torch.uint8, device=device),
        "scale": torch.empty(_range_groups(spec), count, device=device),
        "zero": torch.empty(_range_groups(spec), count, dtype=torch.int32, device=device),
        "sums": torch.empty(spec.num_groups, count, dtype=torch.int32, device=device),
    }
    keep.extend(made.values())
    call = CQuantize(
        x=rows.data_ptr(), row_stride=rows.stride(0), rows=count, columns=spec.in_features,
        code_stride=made["codes"].shape[1], range_groups=_range_groups(spec), sum_groups=spec.num_groups,
        qmax=spec.activation_qmax, symmetric=int(spec.activation_zero_point == "none"),
        scale_dtype=_SCALE_DTYPES[spec.scale_dtype], arithmetic=_ARITHMETICS[spec.activation_arithmetic],
        **{name: tensor.data_ptr() for name, tensor in made.items()},
    )  # fmt: skip
    is_static = spec.activation_range == "static"
    given = {"input_scale": input_scale}
    given |= {"row_scale": tensors.row_scale, "row_zero": tensors.row_zero_point} if is_static else {}
    given |= {} if is_static else {"clip_low": tensors.clip_low, "clip_high": tensors.clip_high}
    _point(call, given, keep)
    return call, made


def _product(
    x: Tensor, weight: Sequence[Tensor], tensors: LinearTensors, spec: LinearSpec, *, between: dict[str, Tensor],
    y: Tensor, keep: list[Tensor],
) -> CMultiply:  # fmt: skip
    """The second launch's argument."""
    zero = "weight_real" if spec.weight_zero_point == "real" else "weight_zero"
    call = CMultiply(
        weight=weight[0].data_ptr(), weight_scale=weight[1].data_ptr(), weight_sums=weight[3].data_ptr(),
        y=y.data_ptr(), rows=len(x), outputs=spec.out_features, code_stride=weight[0].shape[1],
        group=spec.group_size, groups=spec.num_groups, range_groups=_range_groups(spec),
        weight_groups=spec.num_weight_groups, function=_FUNCTIONS[spec.function], gate_rows=1,
        **{name: tensor.data_ptr() for name, tensor in between.items()}, **{zero: weight[2].data_ptr()},
    )  # fmt: skip
    branch = None
    if spec.branch_rank:
        assert tensors.branch_down is not None  # the operator has checked both
        assert tensors.branch_up is not None
        with torch.autocast(x.device.type, enabled=False):
            down, up = tensors.branch_down.to(x.dtype), tensors.branch_up.to(x.dtype)
            branch = functional.linear(functional.linear(x, down), up)
    _point(call, {"bias": tensors.bias, "branch": branch}, keep)
    for name in ("gate", "residual"):
        if (tensor := getattr(tensors, name)) is not None:
            keep.append(dense := tensor if tensor.stride(1) == 1 else tensor.contiguous())
            setattr(call, name, dense.data_ptr())
            setattr(call, f"{name}_row_stride", dense.stride(0))
    if tensors.gate is not None:
        call.gate_rows = len(x) // max(1, len(tensors.gate))
        call.gate_float32 = int(tensors.gate.dtype == torch.float32)
    return call


def _point(call: ctypes.Structure, tensors: dict[str, Tensor | None], keep: list[Tensor]) -> None:
    for name, tensor in tensors.items():
        if tensor is not None:
            keep.append(dense := tensor.contiguous())
            setattr(call, name, dense.data_ptr())


def _check_weight(weight: Sequence[Tensor], spec: LinearSpec) -> None:
    shape = (spec.out_features, _padded(spec.in_features) // 2)
    if weight[0].shape != shape or weight[0].dtype != torch.uint8 or weight[1].dtype != torch.float32:
        raise ValueError(
            f"weight is {weight[0].dtype} {list(weight[0].shape)} with {weight[1].dtype} scales; it must be what prepack "
            f"returned for [{spec.out_features}, {spec.in_features}]: torch.uint8 {list(shape)} with torch.float32 scales"
        )


def _padded(columns: int) -> int:
    return -(-columns // TILE) * TILE


def _range_groups(spec: LinearSpec) -> int:
    return spec.in_features // (spec.activation_group_size or spec.in_features)
