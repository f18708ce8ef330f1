"""The benchmark ``kernels``: packed linears of the CPU backends beside torch's own, in one process and interleaved.

A shape is ``MxK-N`` (a linear on M rows) or ``MxK-H-N`` (a feed-forward with GELU between). In every round each candidate
runs once, one after the other, so that what else the machine does meets all of them; the ratios are medians over the rounds.
Every call makes a fresh output, which torch frees again. The packed linear asks for huge pages for outputs above 2 MiB, torch
does so where THP_MEM_ALLOC_ENABLE=1 is set: the results say whether it was.

Several numbers of threads are calls of the same rounds; ``timing.py`` says how they are timed. Random codes
and inputs: speed does not depend on values. Peers are torchao and ONNX Runtime, of the extra ``peers``; the log and the page
say so where one is not installed.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from qvgen.config.bits import Bits
from qvgen.config.schema.verbs import BenchmarkConfig
from qvgen.evaluation.environment import fast_bfloat16
from qvgen.quant.packing import pack_codes
from qvgen.verbs.benchmarks.base import Shape, cpu_kernel, integer_rates, shapes_of
from qvgen.verbs.benchmarks.kernels import onnx_peers as onnx
from qvgen.verbs.benchmarks.kernels import torchao_peers as torchao
from qvgen.verbs.benchmarks.kernels.timing import (
    BASELINES,
    BF16,
    FLOAT32,
    PREPACKED,
    Candidates,
    Samples,
    clock,
    interleaved,
    ratio,
    sample,
    scaling,
    seconds,
)
from qvgen_kernels import LinearSpec, LinearTensors, packed_linear, prepack, resolve_kernel

log = logging.getLogger(__name__)

PEERS = {"torchao": (torchao, torchao.torchao_candidates), "onnxruntime": (onnx, onnx.onnx_candidates)}
"""By the name of the package: our module for it and the function that builds its candidates."""
PEERS_HINT = "make peers, in a clone of qvgen, installs it"
BLOCK_ROWS = 512
"""Rows that a feed-forward takes through both layers before the next ones: what lies between stays in a cache."""


def kernel_rows(config: BenchmarkConfig, *, done: Container[tuple[Any, ...]]) -> Iterator[dict[str, Any]]:
    """What the machine and the peers are, then one row per shape, number of threads and candidate.

    Args:
        config: The benchmark's.
        done: Shapes that are not measured again, ``(text,)`` each; ``(None,)`` for the machine and the peers.
    """
    shapes = [Shape.parse(text) for text in shapes_of(config)]
    before = torch.get_num_threads()
    try:
        yield from _all_rows(shapes, config, done)
    finally:
        torch.set_num_threads(before)


def _all_rows(
    shapes: Sequence[Shape], config: BenchmarkConfig, done: Container[tuple[Any, ...]]
) -> Iterator[dict[str, Any]]:
    peers = installed_peers()
    if (None,) not in done:
        yield {"peers": peers}
        for threads in config.threads:
            torch.set_num_threads(threads)
            yield {"limits": _limits(threads)}
    for shape in (shape for shape in shapes if (shape.text,) not in done):
        yield from _shape_rows(shape, peers=[name for name in PEERS if peers[name]], config=config)


def installed_peers() -> dict[str, str | None]:
    """The version of each peer; None of those that can't be imported, which the log says with the way to get them."""
    found: dict[str, str | None] = dict.fromkeys(PEERS)
    for name, (ours, _) in PEERS.items():
        try:
            modules = [import_module(module) for module in ours.MODULES]
        except ImportError as error:
            log.warning("%s is left out of the table (%s); %s", name, error, PEERS_HINT)
        else:
            found[name] = modules[0].__version__
    return found


def _limits(threads: int) -> dict[str, Any]:
    """Rates of one core and of the memory, and the allocation policy."""
    source, target = torch.ones(2**25), torch.empty(2**25)
    copying = median(sample(lambda: target.copy_(source)).wall for _ in range(5))
    pages = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return {
        "threads": threads,
        "kernel": cpu_kernel(),
        "vnni": torch.cpu._is_vnni_supported(),
        "tile_gops_of_one_core": integer_rates(),
        "copy_gb_s": 2 * source.nbytes / copying / 1e9,
        "huge_pages": pages.read_text().strip() if pages.is_file() else "unknown",
        "THP_MEM_ALLOC_ENABLE": os.environ.get("THP_MEM_ALLOC_ENABLE", "not set"),
    }


def _shape_rows(shape: Shape, *, peers: Sequence[str], config: BenchmarkConfig) -> Iterator[dict[str, Any]]:
    torch.compiler.reset()  # it keeps eight versions of a module's code; those of the shape before are not needed any more
    x, weights = _tensors(shape)
    candidates: dict[int, Candidates] = {}
    for threads in config.threads:  # built for each: layouts of weights and compiled code may depend on the number
        torch.set_num_threads(threads)
        candidates[threads] = _candidates(x, weights, config.widths)
        for name in peers:
            candidates[threads] |= PEERS[name][1](x, weights, threads)
    samples = interleaved(candidates, rounds=config.timed_steps)
    for threads, name in samples:
        yield _row(shape, samples, threads, name)


def _row(shape: Shape, samples: Samples, threads: int, name: str) -> dict[str, Any]:
    few = next(iter(samples))[0]
    baselines = [other for other in BASELINES if (threads, other) in samples]
    times = {other: seconds(samples[threads, other], threads) for other in (name, *baselines)}
    middle = median(times[name])
    return {
        "shape": shape.text,
        "threads": threads,
        "candidate": name,
        "clock": clock(threads),
        "seconds": times[name],
        "wall_seconds": [one.wall for one in samples[threads, name]],
        "median_ms": 1e3 * middle,
        "gops": shape.operations / middle / 1e9,
        "operations_per_byte": shape.operations / shape.bytes_moved,
        "times": {other: ratio(times[other], times[name]) for other in baselines},
        "scaling": None if threads == few else {"from": few, **scaling(samples[few, name], samples[threads, name])},
    }


def _tensors(shape: Shape) -> tuple[Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape.rows, shape.widths[0], generator=generator).bfloat16()
    pairs = zip(shape.widths[1:], shape.widths, strict=False)
    return x, [torch.randn(*pair, generator=generator).bfloat16() * 0.02 for pair in pairs]


def _candidates(x: Tensor, weights: Sequence[Tensor], widths: Sequence[Bits]) -> Candidates:
    candidates = _torch_feed_forward(x, weights) if len(weights) == 2 else _torch_linears(x, weights[0])
    for width in widths:
        layers = [_packed_layer(*weight.shape, width) for weight in weights]
        if len(layers) == 1:
            candidates[f"packed {width.label}"] = _bind(packed_linear, x, layers[0])
        else:
            candidates[f"packed {width.label}"] = _bind_pair(x, layers, fused=False)
            candidates[f"packed {width.label}, GELU inside, {BLOCK_ROWS} rows a block"] = _bind_pair(
                x, layers, fused=True
            )
    return candidates


def _packed_layer(outputs: int, columns: int, width: Bits) -> dict[str, Any]:
    spec = LinearSpec(
        in_features=columns, out_features=outputs, weight_bits=width.weight, activation_bits=width.activation
    )
    codes = torch.randint(0, 2**width.weight, (outputs, columns), dtype=torch.uint8)
    zero = torch.full((outputs,), 2 ** (width.weight - 1), dtype=torch.uint8)
    kernel = resolve_kernel("auto", spec).name
    planes = pack_codes(codes, bits=width.weight)
    weight = prepack(planes, scale=torch.full((outputs,), 0.01), zero_point=zero, spec=spec, kernel=kernel)
    return {"weight": weight, "tensors": LinearTensors(torch.zeros(outputs)), "spec": spec, "kernel": kernel}


def _bind(operator: Callable[..., Tensor], x: Tensor, layer: Mapping[str, Any]) -> Callable[[], Tensor]:
    return lambda: operator(x, **layer)


def _bind_pair(x: Tensor, layers: Sequence[Mapping[str, Any]], *, fused: bool) -> Callable[[], Tensor]:
    first, second = layers
    if not fused:
        return lambda: packed_linear(functional.gelu(packed_linear(x, **first), approximate="tanh"), **second)
    inside = {**first, "spec": replace(first["spec"], function="gelu_tanh")}
    return lambda: torch.cat([packed_linear(packed_linear(rows, **inside), **second) for rows in x.split(BLOCK_ROWS)])


def _torch_feed_forward(x: Tensor, weights: Sequence[Tensor]) -> Candidates:
    wide = [x.float(), *(weight.float() for weight in weights)]

    def plain(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
        return functional.linear(functional.gelu(functional.linear(x, first), approximate="tanh"), second)

    candidates: Candidates = {BF16: lambda: plain(x, *weights), FLOAT32: lambda: plain(*wide)}
    if fast_bfloat16():
        pointwise = torch.ops.mkldnn._linear_pointwise
        packed = [torch.ops.mkldnn._reorder_linear_weight(weight, len(x)) for weight in weights]
        candidates[PREPACKED] = lambda: pointwise(
            pointwise(x, packed[0], None, "gelu", [], "tanh"), packed[1], None, "none", [], None
        )
    return candidates


def _torch_linears(x: Tensor, weight: Tensor) -> Candidates:
    """What torch itself has for one linear. Its int8 paths get float32 or codes, as they ask for."""
    wide, wide_weight = x.float(), weight.float()
    codes, weight_codes = _codes(wide), _codes(wide_weight).t().contiguous()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates its quantized tensors, and has no other int8 linear on CPUs
        scales = wide_weight.abs().amax(1) / 127
        eight = torch.quantize_per_channel(wide_weight, scales, torch.zeros(len(weight)).long(), 0, torch.qint8)
        dynamic = torch.ops.quantized.linear_prepack(eight, None)
    reduced = not torch.cpu._is_vnni_supported()  # 7-bit inputs: its AVX2 products of 8-bit ones saturate in 16 bits
    group = next((size for size in (64, 32) if x.shape[1] % size == 0), None)
    candidates: Candidates = {
        BF16: lambda: functional.linear(x, weight),
        FLOAT32: lambda: functional.linear(wide, wide_weight),
        "quantized.linear_dynamic (per tensor, float32)": lambda: torch.ops.quantized.linear_dynamic(
            wide, dynamic, reduced
        ),
    }
    if not reduced:  # without VNNI it takes 50 times F.linear's time
        candidates["_int_mm (codes to int32 alone)"] = lambda: torch._int_mm(codes, weight_codes)
    if fast_bfloat16():
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, len(x))
        candidates[PREPACKED] = lambda: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], None)
    if group is not None:
        groups = wide_weight.unflatten(1, (-1, group))
        low, step = groups.amin(2), (groups.amax(2) - groups.amin(2)) / 15
        nibbles = ((groups - low[..., None]) / step[..., None]).round().clamp(0, 15).flatten(1).int()
        four = torch.ops.aten._convert_weight_to_int4pack_for_cpu(nibbles, 1)
        scales_and_zeros = torch.stack([step, low + 8 * step], dim=2).transpose(0, 1).bfloat16().contiguous()
        candidates["int4 weight-only"] = lambda: torch.ops.aten._weight_int4pack_mm_for_cpu(
            x, four, group, scales_and_zeros
        )
    return candidates


def _codes(values: Tensor) -> Tensor:
    """Symmetric int8 codes with one scale."""
    return (values / (values.abs().max() / 127)).round().to(torch.int8)
