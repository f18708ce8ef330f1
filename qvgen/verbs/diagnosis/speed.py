"""Times of packed layers beside bfloat16's on one device, for as long as was asked."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch
from torch.nn import functional

from qvgen.quant.packing import pack_codes
from qvgen.verbs.diagnosis.layer_kind import LayerKind
from qvgen_kernels import LinearSpec, packed_linear, prepack, resolve_kernel

ROWS = {"cpu": 512}
"""Rows of an input by the type of the device; 4096 elsewhere."""

_REPEATS = 7


def speed_rows(
    device: torch.device, kinds: Sequence[LayerKind], shapes: Sequence[tuple[int, int]], *, seconds: float
) -> Iterator[dict[str, Any]]:
    """Median milliseconds of each shape and kind, first those of the first kind; ends when the time is over.

    Codes and inputs are random: speed does not depend on values.
    """
    until = time.monotonic() + seconds
    rows = ROWS.get(device.type, 4096)
    baselines: dict[tuple[int, int], float] = {}
    for kind in kinds:
        for shape in shapes:
            spec = kind.spec(*shape)
            if spec is None:
                continue
            if time.monotonic() > until:
                return
            x = torch.randn(rows, shape[0], device=device).bfloat16()
            if shape not in baselines:
                weight = torch.randn(shape[1], shape[0], device=device).bfloat16()
                baselines[shape] = milliseconds(lambda x=x, weight=weight: functional.linear(x, weight), device)
                del weight
            kernel, call, kept = packed_call(spec, x, device)
            found = milliseconds(call, device)
            yield {
                "device": str(device), "kind": kind.name, "shape": f"{rows}x{shape[0]}-{shape[1]}", "kernel": kernel,
                "bf16_ms": baselines[shape], "packed_ms": found, "times_bf16": baselines[shape] / found,
                "bytes_per_weight": kept / (shape[0] * shape[1]),
            }  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class LayerTime:
    """Median milliseconds of a layer in bfloat16 and packed, and the kernel that runs it packed."""

    kernel: str
    full: float
    packed: float


def layer_time(spec: LinearSpec, *, rows: int, device: torch.device) -> LayerTime:
    """Time a layer of random codes, without a low-rank branch, and with ranges of inputs that are taken at run time."""
    spec = replace(spec, branch_rank=0, activation_range="dynamic")
    x = torch.randn(rows, spec.in_features, device=device).bfloat16()
    weight = torch.randn(spec.out_features, spec.in_features, device=device).bfloat16()
    full = milliseconds(lambda: functional.linear(x, weight), device)
    kernel, call, _ = packed_call(spec, x, device)
    return LayerTime(kernel=kernel, full=full, packed=milliseconds(call, device))


def packed_call(spec: LinearSpec, x: torch.Tensor, device: torch.device) -> tuple[str, Callable[[], torch.Tensor], int]:
    """Name of the kernel, the call, and the bytes that it keeps of the weight besides the checkpoint's own."""
    kernel = resolve_kernel("auto", spec, device=device).name
    codes = torch.randint(0, 2**spec.weight_bits, (spec.out_features, spec.in_features), dtype=torch.uint8)
    shape = (spec.out_features, *([spec.num_weight_groups] if spec.weight_group_size else []))
    dtype = torch.uint8 if spec.weight_zero_point == "integer" else torch.float32
    zero_point = None if spec.weight_zero_point == "none" else torch.ones(shape, dtype=dtype, device=device)
    planes = [plane.to(device) for plane in pack_codes(codes, bits=spec.weight_bits)]
    scale = torch.full(shape, 0.01, device=device)
    weight = prepack(planes, scale=scale, zero_point=zero_point, spec=spec, kernel=kernel)
    kept = sum(tensor.nbytes for tensor in weight)
    return kernel, lambda: packed_linear(x, weight=weight, spec=spec, kernel=kernel), kept


def milliseconds(call: Callable[[], torch.Tensor], device: torch.device) -> float:
    """Median of some calls after one that does not count."""

    def timed() -> float:
        start = time.perf_counter()
        call()
        if device.type != "cpu":
            torch.accelerator.synchronize()
        return (time.perf_counter() - start) * 1000

    first = timed()
    again = timed()
    return median(timed() for _ in range(_REPEATS)) if min(first, again) < 1000 else again
