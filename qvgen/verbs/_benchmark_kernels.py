"""The benchmark ``kernels``: packed linears of the CPU backends beside torch's own, in one process and interleaved.

A shape is ``MxK-N`` (a linear on M rows) or ``MxK-H-N`` (a feed-forward with GELU between). In every round each candidate
runs once, one after the other, so that what else the machine does meets all of them; the ratios are medians over the rounds.
Every call makes a fresh output, which torch frees again. The packed linear asks for huge pages for outputs above 2 MiB, torch
does so where THP_MEM_ALLOC_ENABLE=1 is set: the results say whether it was.

Time is the process's CPU time with one thread (what other programs take on a shared machine does not count) and wall time
with more. Random codes and inputs: speed does not depend on values. Left out: peers that are not installed here.
"""

from __future__ import annotations

import os
import re
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from qvgen.config.bits import Bits
from qvgen.config.verb_schema import BenchmarkConfig
from qvgen.quant.packing import pack_codes
from qvgen_kernels import LinearSpec, LinearTensors, packed_linear, prepack, resolve_kernel
from qvgen_kernels.cpu_library import BACKENDS, library, supported
from qvgen_kernels.fused import packed_feed_forward

BF16, PREPACKED = "F.linear bf16", "prepacked bf16"
SLOW = 8.0
"""A candidate that takes this many times F.linear's time runs in the first two rounds alone."""

Candidates = dict[str, Callable[[], Tensor]]


@dataclass(frozen=True)
class Shape:
    """M rows through layers of these widths."""

    text: str
    rows: int
    widths: tuple[int, ...]

    @classmethod
    def parse(cls, text: str) -> Shape:
        """Read MxK-N or MxK-H-N.

        Raises:
            ValueError: another form.
        """
        found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*(?:-[1-9]\d*){1,2})", text)
        if found is None:
            raise ValueError(f"shapes holds {text!r}; write MxK-N, or MxK-H-N for a feed-forward, as 4096x1920-1920")
        return cls(text, int(found[1]), tuple(int(width) for width in found[2].split("-")))

    @property
    def operations(self) -> float:
        """Multiplications and additions of all layers."""
        pairs = zip(self.widths, self.widths[1:], strict=False)
        return 2.0 * self.rows * sum(first * second for first, second in pairs)

    @property
    def bytes_moved(self) -> float:
        """Bfloat16 input and output once, and one byte per weight."""
        pairs = zip(self.widths, self.widths[1:], strict=False)
        return 2.0 * self.rows * (self.widths[0] + self.widths[-1]) + sum(first * second for first, second in pairs)


def kernel_rows(config: BenchmarkConfig) -> Iterator[dict[str, Any]]:
    """What the machine can do, then one row per shape, number of threads and candidate; a plot beside them."""
    shapes = [Shape.parse(text) for text in config.shapes]
    rows: list[dict[str, Any]] = []
    before = torch.get_num_threads()
    try:
        for threads in config.threads:
            torch.set_num_threads(threads)
            rows.append({"limits": _limits(threads)})
            yield rows[-1]
            for shape in shapes:
                for row in _shape_rows(shape, threads=threads, config=config):
                    rows.append(row)
                    yield row
    finally:
        torch.set_num_threads(before)
    _plot(rows, config.out / "kernels-cpu.svg")


def _limits(threads: int) -> dict[str, Any]:
    """Rates of one core and of the memory, and the allocation policy."""
    rates = {}
    for name, number in BACKENDS.items():
        if supported(name) is None:
            rates[name] = max(_tile_gops(number) for _ in range(5))  # the best: a limit, whatever else the machine did
    source, target = torch.ones(2**25), torch.empty(2**25)
    seconds = median(_timed(lambda: target.copy_(source), time.perf_counter) for _ in range(5))
    pages = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return {
        "threads": threads,
        "tile_gops_of_one_core": rates,
        "copy_gb_s": 2 * source.nbytes / seconds / 1e9,
        "huge_pages": pages.read_text().strip() if pages.is_file() else "unknown",
        "THP_MEM_ALLOC_ENABLE": os.environ.get("THP_MEM_ALLOC_ENABLE", "not set"),
    }


def _tile_gops(backend: int) -> float:
    began = time.process_time()
    operations = library().qv_exercise(backend, 5000)
    return operations / (time.process_time() - began) / 1e9


def _shape_rows(shape: Shape, *, threads: int, config: BenchmarkConfig) -> Iterator[dict[str, Any]]:
    clock = time.process_time if threads == 1 else time.perf_counter
    times = _interleaved(_candidates(shape, config.widths), rounds=config.timed_steps, clock=clock)
    for name, seconds in times.items():
        middle = median(seconds)
        yield {
            "shape": shape.text,
            "threads": threads,
            "candidate": name,
            "clock": clock.__name__,
            "seconds": seconds,
            "median_ms": 1e3 * middle,
            "gops": shape.operations / middle / 1e9,
            "operations_per_byte": shape.operations / shape.bytes_moved,
            "times_bf16": _ratio(times[BF16], seconds),
            "times_prepacked": _ratio(times[PREPACKED], seconds) if PREPACKED in times else None,
        }


def _ratio(base: Sequence[float], seconds: Sequence[float]) -> float:
    """Median over the rounds of how many times as fast as the base."""
    return median(first / second for first, second in zip(base, seconds, strict=False))


def _interleaved(candidates: Candidates, *, rounds: int, clock: Callable[[], float]) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in candidates}
    with torch.no_grad():
        for call in candidates.values():
            call()
        for index in range(rounds):
            for name, call in candidates.items():
                if index < 2 or times[name][0] < SLOW * times[BF16][0]:
                    times[name].append(_timed(call, clock))
    return times


def _timed(call: Callable[[], object], clock: Callable[[], float]) -> float:
    began = clock()
    call()
    return clock() - began


def _candidates(shape: Shape, widths: Sequence[Bits]) -> Candidates:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape.rows, shape.widths[0], generator=generator).bfloat16()
    pairs = list(zip(shape.widths[1:], shape.widths, strict=False))
    weights = [torch.randn(*pair, generator=generator).bfloat16() * 0.02 for pair in pairs]
    candidates = _torch_feed_forward(x, weights) if len(weights) == 2 else _torch_linears(x, weights[0])
    for width in widths:
        layers = [_packed_layer(*pair, width) for pair in pairs]
        if len(layers) == 1:
            candidates[f"packed {width.label}"] = _bind(packed_linear, x, layers[0])
        else:
            candidates[f"packed {width.label}"] = _bind_pair(x, layers, fused=False)
            candidates[f"packed {width.label}, one call"] = _bind_pair(x, layers, fused=True)
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
    if fused:
        both = {f"{name}s": (first[name], second[name]) for name in ("weight", "spec")}
        return lambda: packed_feed_forward(
            x, **both, tensors=(first["tensors"], second["tensors"]), function="gelu_tanh", kernel=first["kernel"]
        )
    return lambda: packed_linear(functional.gelu(packed_linear(x, **first), approximate="tanh"), **second)


def _torch_feed_forward(x: Tensor, weights: Sequence[Tensor]) -> Candidates:
    first, second = weights
    pointwise = torch.ops.mkldnn._linear_pointwise
    packed = [torch.ops.mkldnn._reorder_linear_weight(weight, len(x)) for weight in weights]
    return {
        BF16: lambda: functional.linear(functional.gelu(functional.linear(x, first), approximate="tanh"), second),
        PREPACKED: lambda: pointwise(
            pointwise(x, packed[0], None, "gelu", [], "tanh"), packed[1], None, "none", [], None
        ),
    }


def _torch_linears(x: Tensor, weight: Tensor) -> Candidates:
    """What torch itself has for one linear. Its int8 paths get float32 or codes, as they ask for."""
    wide, wide_weight = x.float(), weight.float()
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, len(x))
    codes = torch.randint(-8, 8, x.shape, dtype=torch.int8)
    weight_codes = torch.randint(-8, 8, weight.t().shape, dtype=torch.int8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates its quantized tensors, and has no other int8 linear on CPUs
        scales = torch.full((len(weight),), 0.01)
        eight = torch.quantize_per_channel(wide_weight, scales, torch.zeros(len(weight)).long(), 0, torch.qint8)
        dynamic = torch.ops.quantized.linear_prepack(eight, None)
    group = next((size for size in (64, 32) if x.shape[1] % size == 0), None)
    candidates: Candidates = {
        BF16: lambda: functional.linear(x, weight),
        PREPACKED: lambda: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], None),
        "F.linear float32": lambda: functional.linear(wide, wide_weight),
        "_int_mm (codes to int32 alone)": lambda: torch._int_mm(codes, weight_codes),
        "quantized.linear_dynamic (per tensor, float32)": lambda: torch.ops.quantized.linear_dynamic(
            wide, dynamic, False
        ),
    }
    if group is not None:
        nibbles = torch.randint(0, 16, weight.shape, dtype=torch.int32)
        four = torch.ops.aten._convert_weight_to_int4pack_for_cpu(nibbles, 1)
        scales_and_zeros = torch.ones(x.shape[1] // group, len(weight), 2, dtype=torch.bfloat16)
        candidates["int4 weight-only"] = lambda: torch.ops.aten._weight_int4pack_mm_for_cpu(
            x, four, group, scales_and_zeros
        )
    return candidates


def kernel_table(head: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The Markdown page."""
    limits = [row["limits"] for row in rows if "limits" in row]
    measured = [row for row in rows if "shape" in row]
    rates = ", ".join(f"{name} {rate:.0f}" for name, rate in limits[0]["tile_gops_of_one_core"].items())
    best = max(limits[0]["tile_gops_of_one_core"].values())
    lines = [
        "# Packed linears on a CPU",
        "",
        f"{head['machine']['cpu']}, torch {head['versions']['torch']}. One process, candidates interleaved, medians of "
        f"{len(measured[0]['seconds'])} rounds, fresh outputs. Integer operations of one core whose operands lie in the "
        f"first-level cache, in GOP/s: {rates}. Copying memory: {limits[0]['copy_gb_s']:.1f} GB/s.",
        f"Huge pages: {limits[0]['huge_pages']}; THP_MEM_ALLOC_ENABLE: {limits[0]['THP_MEM_ALLOC_ENABLE']}; packed "
        "linears ask for them for their outputs. One thread: CPU time; more: wall time.",
        "",
        f"    {head['command']}",
        "",
        "| M x K - N | threads | | ms | GOP/s | of the core's | times F.linear bf16 | times prepacked bf16 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in measured:
        share = row["gops"] / best / row["threads"]
        prepacked = "-" if row["times_prepacked"] is None else f"{row['times_prepacked']:.2f}"
        lines.append(
            f"| {row['shape']} | {row['threads']} | {row['candidate']} | {row['median_ms']:.1f} | {row['gops']:.0f} | "
            f"{share:.0%} | {row['times_bf16']:.2f} | {prepacked} |"
        )
    return [*lines, "", "![Roofline](kernels-cpu.svg)"]


def _plot(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """The roofline: operations per byte against GOP/s, the limits of the first number of threads, every candidate a point."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    limits = next(row["limits"] for row in rows if "limits" in row)
    measured = [row for row in rows if row.get("threads") == limits["threads"]]
    with mpl.rc_context({"svg.hashsalt": "qvgen"}):
        axes = (figure := Figure(figsize=(8, 5), layout="constrained")).subplots()
        intensities = [2.0**power for power in range(2, 15)]
        peak = max(limits["tile_gops_of_one_core"].values()) * limits["threads"]
        axes.loglog(intensities, [min(peak, limits["copy_gb_s"] * value) for value in intensities], "k-")
        for name in dict.fromkeys(row["candidate"] for row in measured):
            points = [row for row in measured if row["candidate"] == name]
            axes.loglog(
                [row["operations_per_byte"] for row in points], [row["gops"] for row in points], "o", label=name
            )
        axes.set_xlabel("operations per byte (bf16 input and output, int8 weights)")
        axes.set_ylabel(f"GOP/s, {limits['threads']} thread(s)")
        axes.legend(fontsize="small")
        figure.savefig(path, metadata={"Date": None})
