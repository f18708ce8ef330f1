"""The benchmark ``ptq_cost``: what every PTQ method costs on a model of full size, extrapolated from its distinct shapes.

The model is built on the meta device. One layer of every distinct (out_features, in_features) is given random weights
with some heavy tails and, where the method needs them, statistics of random inputs with loud channels; the method sets it
up ``timed_steps`` times and the median counts for all layers of that shape: elapsed seconds, and seconds of processor
time, which other load on the machine disturbs less. What a method does depends on shapes and hardly on values (refined
grids and the range search stop earlier on some rows than on others).

Not in the seconds: loading the model, sampling for the calibration (a method without needs has none), folding smoothing
vectors (a few multiplications), packing. Beside them stands the memory that the calibration's statistics take.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import replace
from statistics import median
from typing import Any

import torch
from torch import nn

from qvgen.config.schema.train import TrainConfig
from qvgen.config.schema.verbs import BenchmarkConfig
from qvgen.initializers.base import LayerStatistics, StepRanges
from qvgen.initializers.calibration import MAX_INPUTS, RANGE_STEPS, passes, statistics_bytes
from qvgen.initializers.prepare import PrepareConfig
from qvgen.layers.fake_quant_linear import FakeQuantLinear
from qvgen.layers.noise_band import NoiseBand
from qvgen.layers.swap import select_linears
from qvgen.verbs._parts import ptq_method
from qvgen.verbs.benchmarks.base import Benchmark, methods_of
from qvgen.verbs.benchmarks.ptq import cell

GIB = 2**30
ROWS = 1024
"""Random inputs that the statistics are made from; a second moment of full rank needs more where K is larger, damping stands
in for them."""


def layer_sizes(config: TrainConfig) -> dict[str, tuple[int, int]]:
    """(out_features, in_features) of every Linear that is quantized, by name, counted on the meta device."""
    family = config.model
    with torch.device("meta"):
        skeleton = family.build(family.transformer_config)
    names = select_linears(skeleton, include=family.include, exclude=family.exclude).quantized
    layers = {name: skeleton.get_submodule(name) for name in names}
    return {name: (layer.out_features, layer.in_features) for name, layer in layers.items()}


def cost_rows(config: BenchmarkConfig, *, done: Container[tuple[Any, ...]]) -> Iterator[dict[str, Any]]:
    """One row per bit-width and method: seconds by shape, extrapolated to the model, and the calibration's memory.

    Args:
        config: The benchmark's.
        done: ``(bits, method)`` of rows that are left out.
    """
    sizes = layer_sizes(config.run)
    counts = Counter(sizes.values())
    for width in config.widths:
        for method in (method for method in methods_of(config) if (width.label, method) not in done):
            run = cell(replace(config.run, seed=config.seeds[0]), method, width)
            seconds = {shape: _seconds(run, *shape, repeats=config.timed_steps) for shape in counts}
            yield {
                "method": method,
                "bits": width.label,
                "needs": sorted(ptq_method(run).needs(run.profile)),
                "layers": len(sizes),
                "seconds_extrapolated": sum(seconds[shape][0] * count for shape, count in counts.items()),
                "cpu_seconds_extrapolated": sum(seconds[shape][1] * count for shape, count in counts.items()),
                "load_average": os.getloadavg()[0],
                "shapes": [
                    {
                        "out_features": n,
                        "in_features": k,
                        "layers": counts[n, k],
                        "seconds": seconds[n, k][0],
                        "cpu_seconds": seconds[n, k][1],
                    }
                    for n, k in counts
                ],
                **calibration_memory(run, sizes),
            }


def calibration_memory(config: TrainConfig, sizes: Mapping[str, tuple[int, int]]) -> dict[str, Any]:
    """Bytes of all statistics of a method, the passes that ``calibration.memory_gib`` makes of them, and the largest one."""
    needs = ptq_method(config).needs(config.profile)
    if not needs:
        return {"statistics_bytes": 0, "passes": 0, "largest_pass_bytes": 0}
    inputs = [(name, columns) for name, (_, columns) in sizes.items()]
    bands = PrepareConfig.num_noise_bands
    need = {name: statistics_bytes(columns, needs=needs, num_bands=bands) for name, columns in inputs}
    found = passes(inputs, needs=needs, num_bands=bands, budget_bytes=int(config.calibration.memory_gib * GIB))
    return {
        "statistics_bytes": sum(need.values()),
        "passes": len(found),
        "largest_pass_bytes": max(sum(need[name] for name in names) for names in found),
    }


def _seconds(config: TrainConfig, out_features: int, in_features: int, *, repeats: int) -> tuple[float, float]:
    """Median seconds of the method on one layer, elapsed and of processor time."""
    generator = torch.Generator().manual_seed(config.seed)
    weight = torch.randn(out_features, in_features, generator=generator) / in_features**0.5
    weight[torch.rand(weight.shape, generator=generator) > 0.999] *= 8
    statistics = _statistics(in_features, config=config, generator=generator) if config.init.needs else None
    elapsed, used = [], []
    for _ in range(repeats):
        linear = nn.Linear(in_features, out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(weight)  # the layer copies it
        layer = FakeQuantLinear(linear, profile=config.profile, noise_band=NoiseBand(PrepareConfig.num_noise_bands))
        began, cpu_began = time.perf_counter(), time.process_time()
        config.init.initialize_(layer, statistics=statistics)
        elapsed.append(time.perf_counter() - began)
        used.append(time.process_time() - cpu_began)
    return median(elapsed), median(used)


def _statistics(size: int, *, config: TrainConfig, generator: torch.Generator) -> LayerStatistics:
    """Of random inputs, every 64th channel of which is 30 times louder."""
    rows = torch.randn(ROWS, size, generator=generator)
    rows[:, ::64] *= 30
    needs = config.init.needs
    steps = tuple(20.0 * step for step in range(RANGE_STEPS))
    low, high = (end.expand(RANGE_STEPS, -1) for end in (rows.amin(0), rows.amax(0)))
    return LayerStatistics(
        abs_max=rows.abs().amax(0).expand(PrepareConfig.num_noise_bands, -1),
        second_moment=rows.mT @ rows / ROWS if "second_moment" in needs else None,
        inputs=rows[:MAX_INPUTS] if "inputs" in needs else None,
        num_rows=ROWS,
        ranges=StepRanges(timesteps=steps, low=low, high=high) if "ranges" in needs else None,
    )


def cost_table(head: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The Markdown page."""
    shapes = rows[0]["shapes"]
    names = [f"{shape['in_features']} -> {shape['out_features']} (x {shape['layers']})" for shape in shapes]

    def line(row: Mapping[str, Any]) -> str:
        cells = [
            row["method"],
            f"{row['cpu_seconds_extrapolated']:.0f}",
            f"{row['seconds_extrapolated']:.0f} ({row['load_average']:.1f})",
            *(f"{shape['cpu_seconds']:.2f}" for shape in row["shapes"]),
        ]
        return f"| {' | '.join(cells)} |"

    def memory(row: Mapping[str, Any]) -> str:
        if not row["needs"]:
            return f"| {row['method']} | none | - | - | - |"
        return (
            f"| {row['method']} | {', '.join(row['needs'])} | {row['statistics_bytes'] / GIB:.2f} | {row['passes']} | "
            f"{row['largest_pass_bytes'] / GIB:.2f} |"
        )

    width = rows[0]["bits"]
    first = [row for row in rows if row["bits"] == width]
    columns = ["method", "whole model", "elapsed (load)", *names]
    return [
        f"# Cost of the PTQ methods on {head['model']} at full size, random weights",
        "",
        f"Extrapolated: one layer of every distinct shape is timed (median of {head['timed_steps']}) and counted as often "
        f"as the model has it; {first[0]['layers']} Linears. bits={width}, profile {head['profile']}. "
        f"{head['machine']['cpu']}, threads: {head['machine']['num_threads']}, torch {head['versions']['torch']}. "
        "Loading, sampling for the calibration, folds and packing are not in it.",
        "",
        f"    {head['command']}",
        "",
        "## Seconds of processor time",
        "",
        "By shape, in -> out (x layers). Elapsed: the same by the clock, and behind it the load average of the machine's "
        f"{head['machine']['num_cores']} cores at the time.",
        "",
        f"| {' | '.join(columns)} |",
        "|---" * len(columns) + "|",
        *map(line, first),
        "",
        "## Memory of the calibration's statistics, GiB",
        "",
        f"In passes of at most calibration.memory_gib={head['memory_gib']:g}; every pass samples the same videos again.",
        "",
        "| method | statistics | all layers | passes | largest pass |",
        "|---|---|---|---|---|",
        *map(memory, first),
    ]


def _subject(config: BenchmarkConfig) -> str:
    """The name of the model's repository, since its size is what counts."""
    return getattr(config.run.model, "repository", "").rpartition("/")[2].lower() or config.run.names.model


BENCHMARK = Benchmark(rows=cost_rows, table=cost_table, subject=_subject, group=("bits", "method"))
