"""The benchmark ``fake_quantization``: passes of one trainable Linear, fused and by torch alone, interleaved in one process.

A shape is MxK-N: M rows through a Linear of K columns and N outputs with the run's profile and Phi. In every round the
forward and the backward pass are timed once by torch, once with fused operators and once as a plain nn.Linear, in turn; the
bits of the first two are compared. A ratio is the median of the rounds' ratios, so that what slows the machine down for a
while falls on both. Times are processor time of the calling thread where one thread runs, and wall time otherwise.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from qvgen.config.bits import Bits
from qvgen.config.schema.verbs import BenchmarkConfig
from qvgen.initializers.rtn import RoundToNearest
from qvgen.layers.fake_quant_linear import FakeQuantLinear
from qvgen.layers.fused_product import unfused
from qvgen.layers.noise_band import NoiseBand
from qvgen.verbs.benchmarks.base import (
    Benchmark,
    Shape,
    cpu_kernel,
    of_rounds,
    shapes_of,
    shown_rounds,
    table_lines,
    timed_cells,
)
from qvgen.verbs.benchmarks.loading import profile_of


def fake_quantization_rows(config: BenchmarkConfig, *, done: Container[tuple[Any, ...]]) -> Iterator[dict[str, Any]]:
    """One row per shape, width and number of threads.

    Raises:
        ValueError: A shape of two layers.
    """
    for shape in map(Shape.parse, shapes_of(config)):
        if len(shape.widths) != 2:
            raise ValueError(f"shapes holds {shape.text!r}; one layer is measured: write MxK-N, as 1024x1920-1920")
    for text, width, threads in timed_cells(config, [text for text in shapes_of(config) if (text,) not in done]):
        yield _measure(Shape.parse(text), width, threads, config)


def _measure(shape: Shape, width: Bits, threads: int, config: BenchmarkConfig) -> dict[str, Any]:
    columns, outputs = shape.widths
    with torch.random.fork_rng():
        torch.manual_seed(config.run.seed)
        linear = nn.Linear(columns, outputs)
        x, gradient = torch.randn(1, shape.rows, columns), torch.randn(1, shape.rows, outputs)
    profile = profile_of(config.run.profile, width).fitted([columns])
    rank = min(config.run.phi.rank, columns, outputs)
    layer = FakeQuantLinear(linear, profile=profile, noise_band=NoiseBand(1), phi_rank=rank)
    RoundToNearest().initialize_(layer, statistics=None)
    layer.start_phi_(generator=torch.Generator().manual_seed(config.run.seed))
    layer.noise_band.set_timestep(torch.zeros(1))
    clock = time.thread_time if threads == 1 else time.perf_counter
    candidates: dict[str, Callable[[], tuple[list[float], list[Tensor]]]] = {
        "torch": lambda: _by_torch(layer, x, gradient, clock),
        "fused": lambda: _passes(layer, x, gradient, clock),
        "linear": lambda: _passes(linear, x, gradient, clock),
    }
    times: dict[str, list[list[float]]] = {name: [] for name in candidates}
    same = True
    for number in range(config.timed_steps + 1):
        results = {name: run() for name, run in candidates.items()}
        same = same and all(map(torch.equal, results["torch"][1], results["fused"][1]))
        if number:  # the first round warms up
            for name, (seconds, _) in results.items():
                times[name].append(seconds)
    return {
        "shape": shape.text,
        "bits": width.label,
        "threads": threads,
        "bits_equal": same,
        "seconds": times,
        **{f"{name}_ms": [1000 * median(part) for part in zip(*own, strict=True)] for name, own in times.items()},
        "speedup": _ratios(times["torch"], times["fused"]),
    }


def _passes(
    layer: nn.Module, x: Tensor, gradient: Tensor, clock: Callable[[], float]
) -> tuple[list[float], list[Tensor]]:
    """Seconds of the forward and of the backward pass; y, and the gradients of x and of all parameters that have one."""
    x = x.detach().requires_grad_()
    layer.zero_grad(set_to_none=True)
    began = clock()
    y = layer(x)
    middle = clock()
    y.backward(gradient)
    ended = clock()
    grads = [value.grad for value in (x, *layer.parameters()) if value.grad is not None]
    return [middle - began, ended - middle], [y.detach(), *grads]


def _by_torch(layer: nn.Module, x: Tensor, gradient: Tensor, clock: Callable[[], float]) -> Any:
    with unfused():
        return _passes(layer, x, gradient, clock)


def _ratios(slow: Sequence[Sequence[float]], fast: Sequence[Sequence[float]]) -> dict[str, list[float]]:
    """Lowest, median and highest ratio of the rounds: of forward passes, of backward passes, of both."""
    found = {
        "forward": [a[0] / b[0] for a, b in zip(slow, fast, strict=True)],
        "backward": [a[1] / b[1] for a, b in zip(slow, fast, strict=True)],
        "both": [sum(a) / sum(b) for a, b in zip(slow, fast, strict=True)],
    }
    return {name: of_rounds(own) for name, own in found.items()}


def fake_quantization_table(head: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The Markdown page."""
    columns = [
        "M x K -> N", "bits", "threads", "torch ms", "fused ms", "nn.Linear ms", "quantization ms", "forward", "backward",
        "both",
    ]  # fmt: skip
    equal = "equal" if all(row["bits_equal"] for row in rows) else "NOT equal"
    return [
        f"# Passes of a fake-quantized Linear, profile {head['profile']}",
        "",
        f"{head['machine']['cpu']}, torch {head['versions']['torch']}, float32, with Phi. Forward + backward pass; medians "
        f"of {head['timed_steps']} interleaved rounds in one process. Quantization is what both passes take longer than "
        "those of nn.Linear, by torch and fused. The last three columns are the time by torch over the time with fused "
        "operators: median of the rounds' ratios (lowest to highest).",
        f"The bits of all outputs and gradients were {equal} in every round.",
        "",
        f"    {head['command']}",
        "",
        *table_lines(columns, map(_cells, rows)),
    ]


def _cells(row: Mapping[str, Any]) -> list[str]:
    times = [f"{a:.2f} + {b:.2f}" for a, b in (row[f"{name}_ms"] for name in ("torch", "fused", "linear"))]
    added = [sum(row[f"{name}_ms"]) - sum(row["linear_ms"]) for name in ("torch", "fused")]
    ratios = [shown_rounds(own) for own in row["speedup"].values()]
    return [row["shape"], row["bits"], str(row["threads"]), *times, f"{added[0]:.2f}; {added[1]:.2f}", *ratios]


def _describe(config: BenchmarkConfig) -> str:
    """What would be measured."""
    widths = ", ".join(width.label for width in config.widths)
    return f"fake_quantization: shapes {', '.join(shapes_of(config))} at {widths} on {list(config.threads)} threads"


BENCHMARK = Benchmark(
    rows=fake_quantization_rows,
    table=fake_quantization_table,
    describe=_describe,
    subject=lambda _: f"cpu-{cpu_kernel()}",
    group=("shape",),
    shapes=("2048x64-64", "1024x1920-1920", "1024x8960-1536"),
    several_rows=True,
)
