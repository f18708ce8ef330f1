"""The benchmark ``methods``: training methods beside each other, from one start, in equal steps, and in pairs.

Each cell is a whole run of ``qvgen train`` (of ``qvgen ptq`` for a PTQ method) with a folder of its own below the benchmark's
``run_dir``, so that its videos and its curves can be looked at, and a cell that was stopped goes on at its last checkpoint.
All cells are measured on the same held-out inputs; of the same seed and widths they also draw the same noise while they are
trained, so that errors are compared in pairs: the mean of the ratios says more than the ratio of the means.

A name may carry changes of the configuration, for ablations: ``qvgen+phi.start=zero``, ``kd+init=vidit_q+r16``.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from qvgen.config.bits import Bits
from qvgen.config.leaves import leaf_names, load_leaf
from qvgen.config.schema.verbs import BenchmarkConfig
from qvgen.errors import UserError, did_you_mean
from qvgen.evaluation.report.charts import read_history
from qvgen.verbs.benchmarks._cells import finished_runs, run_of_cell
from qvgen.verbs.benchmarks.base import Benchmark, about_seeds, mean_and_spread, table_lines

REFERENCE = "kd"
"""The method that others are compared with in pairs, where it is among them; else the first that trains."""

EARLY_SHARE = 0.15
"""Share of a run's steps, its first ones, whose gradient norm has a column of its own: Phi has most of its rank there."""

_OF_CELLS = {
    "bits": "write widths=[...]",
    "seed": "write seeds=[...]",
    "method": "name that method itself",
    "model": "models are compared by a command each",
    "run_dir": "every cell has a folder of its own below the run_dir of the benchmark",
    "resume": "cells always go on",
}
"""Keys that a name of ``methods`` can't change, and what to write instead."""

_VIDEO_METRICS = ("psnr_db", "ssim", "flicker")
_NORMS = ("gradient_norm", "gradient_norm_weights")
_COLUMNS = {
    "error_start": ("error, start", ".4f"),
    "error": ("error, trained", ".4f"),
    "pairs": ("in pairs", "+.1f"),
    "psnr_db": ("PSNR in dB", ".2f"),
    "ssim": ("SSIM", ".4f"),
    "flicker": ("flicker", ".4f"),
    "gradient_norm_weights_early": ("norm of the weights' gradient, first steps", ".3f"),
    "gradient_norm_weights": ("all steps", ".3f"),
    "train_s": ("seconds", ".0f"),
}
"""Columns of the page: words above them, and the form of their numbers."""


def changes_of(name: str) -> tuple[str, dict[str, str]]:
    """The method of a name ``METHOD+rN+KEY=VALUE``, and what it changes in the configuration: key -> value."""
    stem, *parts = re.split(r"\+(?=r\d+(?:\+|$)|[\w./]+=)", name)
    pairs = [part.partition("=") if "=" in part else ("profile.rotation", "=", part[1:]) for part in parts]
    return stem, {key: value for key, _, value in pairs}


def compared_methods(config: BenchmarkConfig) -> list[str]:
    """What is compared: what was asked for; or the configured start, and every method that trains a quantized model.

    A name is a file of conf/method, or of conf/init for a PTQ method alone; ``NAME+rN`` rotates inputs by N, and
    ``NAME+KEY=VALUE`` changes any other key of its cells.

    Raises:
        UserError: There is none of that name, or it changes what sets cells apart.
    """
    trained = [name for name in leaf_names("method") if load_leaf("method", name).trains == "student"]
    known = [*trained, *leaf_names("init")]
    for name in config.methods or ():
        stem, changes = changes_of(name)
        if stem not in known:
            raise UserError(f"methods holds {name!r}{did_you_mean(stem, known)} (there are: {', '.join(known)})")
        for key in _OF_CELLS:
            if key in changes:
                raise UserError(f"methods holds {name!r}, which can't change {key}; {_OF_CELLS[key]}")
    return list(config.methods or [config.run.names.init, *trained])


def _leaves(config: BenchmarkConfig) -> list[object]:
    found = []
    for stem, changes in map(changes_of, compared_methods(config)):
        found.append(load_leaf("init" if stem in leaf_names("init") else "method", stem))
        found += [load_leaf("init", changes["init"])] if changes.get("init") in leaf_names("init") else []
    return found


def describe(config: BenchmarkConfig) -> str:
    """What it would train, for a dry run."""
    names = compared_methods(config)
    count = len(names) * len(config.widths) * len(config.seeds)
    return f"methods on {config.run.names.model}: {count} runs ({', '.join(names)})"


def method_rows(config: BenchmarkConfig, *, done: Container[tuple[Any, ...]]) -> Iterator[dict[str, Any]]:
    """One row per seed, bit-width and method, in this order; ``done`` holds those triples that are left out."""
    runs = finished_runs(config, compared_methods(config), plain=partial(_plain, config), done=done)
    for (seed, width, name), run_dir, report in runs:
        yield {"method": name, "bits": width.label, "seed": seed, **_measured(report, run_dir)}


def _plain(config: BenchmarkConfig, seed: int, width: Bits, name: str) -> tuple[str, dict[str, Any]]:
    """Verb and configuration of one cell."""
    stem, changes = changes_of(name)
    cell: dict[str, str | int] = {"bits": width.label, "seed": seed, **changes}
    folder = re.sub(r"[^\w.+]", "-", f"{name}-{width.label}-{seed}")
    if stem in leaf_names("init"):
        return "ptq", run_of_cell(config, "ptq", {**cell, "init": stem}, name=folder, without=("steps", "method"))
    return "train", run_of_cell(config, "train", {**cell, "method": stem}, name=folder)


def _measured(report: Mapping[str, Any], run_dir: Path) -> dict[str, Any]:
    """The figures of a cell, from its run's report and curves; a figure that the run does not have is None."""
    errors, is_trained = report["relative_error"], report["steps"] > 0
    videos = (report.get("quality") or {}).get("variants", {}).get("packed", {})
    history = read_history(run_dir / "metrics.csv")
    norms: dict[str, float | None] = {}
    for name in _NORMS:
        _, values = history.get(f"train/{name}", (None, np.zeros(0)))
        early = values[: max(1, round(EARLY_SHARE * len(values)))]
        norms |= {name: float(values.mean()) if len(values) else None}
        norms |= {f"{name}_early": float(early.mean()) if len(values) else None}
    return {
        "init": report["init"],
        "steps": report["steps"],
        "error_start": errors.get("ptq"),
        "error": errors.get("packed") if is_trained else None,
        **{name: videos.get(name) for name in _VIDEO_METRICS},
        **norms,
        "init_s": report["seconds"]["init"],
        "train_s": report["seconds"].get("train") if is_trained else None,
    }


def in_pairs(rows: Sequence[Mapping[str, Any]], *, reference: str) -> dict[tuple[str, str], list[float]]:
    """(bits, method) -> by how many per cent its errors are above the reference method's, of each seed that both have."""
    errors = {(row["bits"], row["seed"], row["method"]): row["error"] for row in rows if row["error"] is not None}
    found: dict[tuple[str, str], list[float]] = {}
    for (bits, seed, method), error in errors.items():
        if method != reference and (other := errors.get((bits, seed, reference))):
            found.setdefault((bits, method), []).append(100 * (error / other - 1))
    return found


def _reference(rows: Sequence[Mapping[str, Any]]) -> str:
    trained = list(dict.fromkeys(row["method"] for row in rows if row["error"] is not None))
    return REFERENCE if REFERENCE in trained or not trained else str(trained[0])


def _common(rows: Sequence[Mapping[str, Any]], key: str) -> str:
    """The value of all rows that train and whose name does not change it; of all rows, if none does."""
    found = [row[key] for row in rows if row["steps"] > 0 and key not in changes_of(row["method"])[1]]
    return ", ".join(dict.fromkeys(map(str, found or [row[key] for row in rows])))


def method_table(head: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The Markdown page: mean over the seeds, and half the spread between the smallest and the largest."""
    widths, names, seeds = (list(dict.fromkeys(row[key] for row in rows)) for key in ("bits", "method", "seed"))
    reference = _reference(rows)
    pairs = in_pairs(rows, reference=reference)
    start, steps = (_common(rows, key) for key in ("init", "steps"))
    lines = [
        f"# Methods on {head['model']}",
        "",
        f"Profile {head['profile']}, init={start}, {steps} steps. {about_seeds(head, seeds)}",
        "",
        f"    {head['command']}",
    ]
    for width in widths:
        bits = Bits.parse(width)
        table = []
        for name in names:
            found = [row for row in rows if (row["bits"], row["method"]) == (width, name)]
            values = {
                key: pairs.get((width, name), []) if key == "pairs" else [r[key] for r in found] for key in _COLUMNS
            }
            shown = [mean_and_spread(values[key], form) for key, (_, form) in _COLUMNS.items()]
            table += [[name, *shown]] if found else []
        columns = ["method", *(words for words, _ in _COLUMNS.values())]
        lines += ["", f"## W{bits.weight}A{bits.activation}", "", *table_lines(columns, table)]
    return [
        *lines,
        "",
        f"Error: held out, |y - y_fp|^2 / |y_fp|^2 of the packed model, {head['samples']} inputs, the same in all cells. In "
        f"pairs: per cent above {reference}'s error of the same seed and widths. PSNR, SSIM, flicker: videos of the packed "
        "model beside the full-precision model's, same captions and noise. Norms are taken before clipping, without Phi's "
        f"own gradient; the first steps are {EARLY_SHARE:.0%} of all.",
        "",
    ]


def plot_methods(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Held-out error of every method and bit-width: a bar for the mean, a line from the smallest to the largest."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    widths, names = (list(dict.fromkeys(row[key] for row in rows)) for key in ("bits", "method"))
    figure = Figure(figsize=(3 + 2.2 * len(widths), 3.6), layout="constrained")
    for place, (axes, width) in enumerate(zip(figure.subplots(1, len(widths), squeeze=False)[0], widths, strict=True)):
        for height, name in enumerate(names):
            of = [row for row in rows if (row["bits"], row["method"]) == (width, name)]
            errors = [row["error_start"] if row["error"] is None else row["error"] for row in of]
            if errors:
                low, high = min(errors), max(errors)
                mean = min(max(fmean(errors), low), high)  # a mean of equal numbers is rounded, too
                axes.barh(
                    height, mean, xerr=[[mean - low], [high - mean]], color="C7" if of[0]["error"] is None else "C0"
                )
        axes.set_yticks(range(len(names)), names if place == 0 else [""] * len(names))
        axes.invert_yaxis()
        axes.set_title(f"bits={width}")
        axes.set_xlabel("held-out relative error")
    with mpl.rc_context({"svg.hashsalt": "qvgen"}):
        figure.savefig(path, format="svg", metadata={"Date": None})


BENCHMARK = Benchmark(
    rows=method_rows,
    table=method_table,
    describe=describe,
    group=("seed", "bits", "method"),
    plot=plot_methods,
    leaves=_leaves,
    real_weights=True,
)
