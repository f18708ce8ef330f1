"""The benchmark ``clips``: where clips of activations lose least, what starting them by a table costs, what a search gains.

    table    for every kind of inputs, bits and length of a row: the best clip of random rows, beside the entry that is used
    random   layers of random weights at the widths of real models: error |(Q(x) - x) W^T| / |x W^T| with the table's clip,
             with those that a search finds on other rows, and with fixed ones: 0.9025, where the QVGen release starts, and
             what fits few columns (0.95 at up to 3 bits, 0.98 at 4, 0.995 at 5, 0.999 above)
    model    the same for every kind of layer of the chosen model, on inputs that it was not searched on

Rows of ``random`` are Gaussian, GELU or SiLU of it, Student's t with 3 degrees of freedom, and Gaussian with a hundredth of
the channels ten times as loud.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from qvgen.config.leaves import load_leaf
from qvgen.config.schema.verbs import BenchmarkConfig
from qvgen.initializers.calibration import MAX_INPUTS
from qvgen.initializers.prepare import initialize_
from qvgen.layers.fake_quant_product import to_grid_input
from qvgen.layers.input_kind import input_kinds
from qvgen.layers.swap import quantized_layers
from qvgen.quant.clip_start import COLUMNS, TABLE, Clips, initial_clip, output_error, search_clips
from qvgen.quant.grid import Grid
from qvgen.training.calibration.statistics import CalibratedModel
from qvgen.training.start.student import prepare_student
from qvgen.verbs._parts import sampled_teacher, student_design
from qvgen.verbs.benchmarks.base import Benchmark

WIDTHS = (64, 384, 1920, 8960)
OUTPUTS = 256
VALUES = 1 << 20
"""Random values of a cell, so that a row of any length has enough of them."""

FINE = tuple(round(0.2 + 0.01 * i, 2) for i in range(80))
"""Clips that the table's entries are looked for among, and 0.999."""

_GROUP = ("part", "kind", "symmetric", "bits", "layer")

RELEASE = 0.9025
FOR_FEW_COLUMNS = {2: 0.95, 3: 0.95, 4: 0.98, 5: 0.995}

KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "gaussian": lambda z: z,
    "gelu": lambda z: functional.gelu(z, approximate="tanh"),
    "silu": functional.silu,
}


def clip_rows(config: BenchmarkConfig, *, done: Container[tuple[Any, ...]]) -> Iterator[dict[str, Any]]:
    """Rows of the three parts, in this order; ``done`` holds groups that are left out."""
    for kind, symmetric in TABLE:
        for bits in range(2, 9):
            for columns in COLUMNS:
                group = ("table", kind, symmetric, bits, str(columns))
                if group not in done:
                    grid = _grid(bits, symmetric=symmetric)
                    best = _best_clip(_random(kind, columns, seed=config.seeds[0]), grid)
                    used = initial_clip(grid, columns=columns, kind=kind)
                    yield {**_named(group), "best": best, "table": used}
    for kind in (*KINDS, "t3", "loud channels"):
        for width in config.widths:
            for columns in WIDTHS:
                group = ("random", kind, False, width.activation, str(columns))
                if group not in done:
                    yield {**_named(group), **_random_errors(kind, columns, width.activation, seed=config.seeds[0])}
    for width in config.widths:
        for row in _model_rows(config, width.activation):
            if tuple(row[key] for key in _GROUP) not in done:
                yield row


def _named(group: tuple[str, str, bool, int, str]) -> dict[str, Any]:
    return dict(zip(_GROUP, group, strict=True))


def _grid(bits: int, *, symmetric: bool = False) -> Grid:
    return Grid(bits=bits, granularity="per_token", zero_point="none" if symmetric else "integer")


def _random(kind: str, columns: int, *, seed: int) -> Tensor:
    """float32 [n, columns]."""
    generator = torch.Generator().manual_seed(seed + columns)
    z = torch.randn(max(64, min(4096, VALUES // columns)), columns, generator=generator)
    if kind == "t3":
        return z / (torch.randn(3, *z.shape, generator=generator).square().sum(0) / 3).sqrt()
    if kind == "loud channels":
        z[:, : max(1, columns // 100)] *= 10
        return z
    return KINDS[kind](z)


def _best_clip(rows: Tensor, grid: Grid) -> float:
    """The clip of both ends with the least error of the inputs themselves."""
    return min((*FINE, 0.999), key=lambda clip: output_error(rows, None, (clip, clip), grid))


def _errors(rows: Tensor, weight: Tensor, grid: Grid, clips: Mapping[str, Clips]) -> dict[str, float]:
    """Relative error of x W^T with each pair of clips."""
    whole = float((rows @ weight.mT).square().sum())
    return {name: (output_error(rows, weight, pair, grid) / whole) ** 0.5 for name, pair in clips.items()}


def _starts(grid: Grid, columns: int, kind: str) -> dict[str, Clips]:
    known = kind if kind in ("gelu", "silu", "bounded") else "gaussian"
    table = initial_clip(grid, columns=columns, kind=known)  # type: ignore[arg-type]
    few = FOR_FEW_COLUMNS.get(grid.bits, 0.999)
    return {"table": (table, table), "release": (RELEASE, RELEASE), "few_columns": (few, few)}


def _random_errors(kind: str, columns: int, bits: int, *, seed: int) -> dict[str, Any]:
    grid, rows = _grid(bits), _random(kind, columns, seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    weight = torch.randn(OUTPUTS, columns, generator=generator)
    half = min(len(rows) // 2, MAX_INPUTS)
    clips = search_clips(rows[:half], [weight], grid=grid)
    starts = {"search": clips, **_starts(grid, columns, kind)}
    return {"clips": clips, "errors": _errors(rows[half : 2 * half], weight, grid, starts)}


def _model_rows(config: BenchmarkConfig, bits: int) -> Iterator[dict[str, Any]]:
    """Mean over the layers of each kind."""
    base = replace(config.run, seed=config.seeds[0])
    profile = replace(base.profile, activation=replace(base.profile.activation, bits=bits))
    base = replace(base, profile=profile)
    teacher = base.model.load_teacher()
    split = base.data.open(base.model, split="held_out")
    student, _ = prepare_student(base.model, student_design(base), seed=base.seed)
    sampled = sampled_teacher(base, teacher, encode=split.encode)
    bands = next(iter(quantized_layers(student).values())).noise_band.num_bands
    seen = CalibratedModel(sampled, base.calibration, needs={"inputs"}, num_bands=bands)
    initialize_(student, load_leaf("init", "rtn"), seed=base.seed, statistics=seen)
    found: dict[str, list[dict[str, float]]] = {}
    kinds = input_kinds(teacher, [name for name, part in teacher.named_modules() if isinstance(part, nn.Linear)])
    for name, layer in quantized_layers(student).items():
        grid, inputs = profile.activation, seen(name).inputs
        assert inputs is not None
        rows = to_grid_input(inputs, layer.input_scale, profile=layer.profile)
        clips = search_clips(rows[::2], [layer.weight], grid=grid)
        starts = {"search": clips, **_starts(grid, layer.in_features, kinds[name])}
        found.setdefault(_layer_kind(name), []).append(_errors(rows[1::2], layer.weight.detach(), grid, starts))
    for kind, several in found.items():
        errors = {start: fmean(errors[start] for errors in several) for start in several[0]}
        yield {**_named(("model", "own", False, bits, kind)), "layers": len(several), "errors": errors}


def _layer_kind(name: str) -> str:
    """A layer's name without its block's number."""
    return re.sub(r"\.\d+\.", ".", name)


def clip_table(head: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The Markdown page."""
    lines = [
        f"# Clips of activations, at random and on {head['model']}",
        "",
        f"    {head['command']}",
        "",
        "How the parts are measured: qvgen/verbs/benchmarks/clips.py. Errors are relative, of a layer's output, from the",
        "quantization of its inputs alone; `few columns` are the clips that suit 64 columns.",
        "",
        "## Best clip of random rows (in brackets: the entry that is used, where it is another)",
    ]
    table = [row for row in rows if row["part"] == "table"]
    for kind, symmetric in dict.fromkeys((row["kind"], row["symmetric"]) for row in table):
        title = f"{kind}, {'symmetric' if symmetric else 'asymmetric'}"
        lines += [
            "",
            f"| {title}, bits | {' | '.join(f'K = {k}' for k in COLUMNS)} |",
            "|---" * (len(COLUMNS) + 1) + "|",
        ]
        for bits in range(2, 9):
            cells = [row for row in table if (row["kind"], row["symmetric"], row["bits"]) == (kind, symmetric, bits)]
            shown = [
                f"{row['best']:.3g}" + ("" if abs(row["best"] - row["table"]) < 0.0051 else f" ({row['table']:.3g})")
                for row in cells
            ]
            lines.append(f"| {bits} | {' | '.join(shown)} |")
    for part, title in (("random", "Layers of random weights"), ("model", f"Layers of {head['model']}")):
        lines += [
            "",
            f"## {title}",
            "",
            "| inputs | bits | search | table | release | few columns |",
            "|---|---|---|---|---|---|",
        ]
        for row in rows:
            if row["part"] == part:
                of = f"{row['kind']}, K = {row['layer']}" if part == "random" else row["layer"]
                errors = [row["errors"][start] for start in ("search", "table", "release", "few_columns")]
                others = " | ".join(f"{error:.4f} ({error / errors[0]:.2f}x)" for error in errors[1:])
                lines.append(f"| {of} | {row['bits']} | {errors[0]:.4f} | {others} |")
    return lines


def describe(config: BenchmarkConfig) -> str:
    """What it would measure, for a dry run."""
    bits = ", ".join(str(width.activation) for width in config.widths)
    return f"clips: the table's entries, random layers and {config.run.names.model} at {bits} activation bits"


BENCHMARK = Benchmark(
    rows=clip_rows, table=clip_table, describe=describe, group=_GROUP,
    real_weights=True,
)  # fmt: skip
