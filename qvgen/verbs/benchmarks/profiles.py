"""The benchmark ``profiles``: what every profile costs in quality, at the start of training and after it, on one model.

Each cell is a whole run of ``qvgen train`` with a folder of its own below the benchmark's ``run_dir``, so that its videos and
its report can be looked at, and a cell that was stopped goes on at its last checkpoint. The limits of a profile's runtime are
lifted: widths that it does not have run on our own kernels, and the page marks them.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from functools import partial
from statistics import fmean
from typing import Any

from qvgen.config.bits import Bits
from qvgen.config.leaf_file import leaf_names
from qvgen.config.leaves import load_profile
from qvgen.config.schema.verbs import BenchmarkConfig
from qvgen.errors import UserError, did_you_mean
from qvgen.verbs.benchmarks._cells import finished_runs, run_of_cell
from qvgen.verbs.benchmarks.base import Benchmark, about_seeds, mean_and_spread, table_lines

STAGES = {"rtn": "round to nearest", "ptq": "start", "qat": "trained"}
"""Key of a report's relative errors -> what the page calls it."""

_VIDEOS = {"start": "ptq-start", "trained": "packed"}
"""What the page calls a stage -> the report's variant whose videos are compared with the full-precision model's."""


def profiles_of(config: BenchmarkConfig) -> list[str]:
    """The profiles that are compared: those that were asked for, or all that there are.

    Raises:
        UserError: There is none of that name.
    """
    known = leaf_names("profile")
    for name in config.profiles or ():
        if name not in known:
            raise UserError(f"profiles holds {name!r}{did_you_mean(name, known)} (there are: {', '.join(known)})")
    return list(config.profiles or known)


def describe(config: BenchmarkConfig) -> str:
    """What it would train, for a dry run."""
    names = profiles_of(config)
    count = len(names) * len(config.widths) * len(config.seeds)
    return f"profiles on {config.run.names.model}: {count} runs of qvgen train ({', '.join(names)})"


def profile_rows(config: BenchmarkConfig, *, done: Container[tuple[Any, ...]]) -> Iterator[dict[str, Any]]:
    """One row per seed, bit-width and profile, in this order; ``done`` holds those triples that are left out."""
    runs = finished_runs(config, profiles_of(config), plain=partial(_plain, config), done=done)
    for (seed, width, name), _, report in runs:
        yield {"profile": name, "bits": width.label, "seed": seed, **_measured(report, width, name)}


def _plain(config: BenchmarkConfig, seed: int, width: Bits, name: str) -> tuple[str, dict[str, Any]]:
    """Verb and configuration of one cell."""
    cell = {"profile": name, "bits": width.label, "seed": seed, "profile.runtime": "null"}
    return "train", run_of_cell(config, "train", cell, name=f"{name}-{width.label}-{seed}")


def _measured(report: Mapping[str, Any], width: Bits, name: str) -> dict[str, Any]:
    """The figures of a cell, from its run's report; a figure that the run did not measure is None."""
    runtime = load_profile(name, width).runtime
    variants = (report.get("quality") or {}).get("variants", {})
    return {
        "init": report["init"],
        "steps": report["steps"],
        "runtime": None if runtime is None else runtime.name,
        "in_runtime": runtime is None or runtime.has(width.weight, width.activation),
        **{f"error_{stage}": report["relative_error"].get(stage) for stage in STAGES},
        **{f"psnr_db_{stage}": variants.get(found, {}).get("psnr_db") for stage, found in _VIDEOS.items()},
        "packed_bytes": report["bytes"]["packed"],
        "train_s": report["seconds"]["train"],
    }


def profile_table(head: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The Markdown page: mean over the seeds, and half the spread between the smallest and the largest."""
    widths, names, seeds = (list(dict.fromkeys(row[key] for row in rows)) for key in ("bits", "profile", "seed"))
    first = rows[0]
    lines = [
        f"# Profiles on {head['model']}",
        "",
        f"Start: init={first['init']}. Trained: {first['steps']} steps from there, then folded and packed. "
        f"{about_seeds(head, seeds)}",
        "",
        f"    {head['command']}",
        "",
        "A star marks widths that the profile's runtime does not have: they run on qvgen's own kernels alone "
        "(`profile.runtime=null`).",
    ]
    for width in widths:
        bits = Bits.parse(width)
        table = []
        for name in names:
            found = [row for row in rows if (row["bits"], row["profile"]) == (width, name)]
            if not found:
                continue
            where = found[0]["runtime"] or "qvgen"
            cells = [
                name,
                where if found[0]["in_runtime"] else "qvgen*",
                *(mean_and_spread([row[f"error_{stage}"] for row in found], ".4f") for stage in STAGES),
                *(mean_and_spread([row[f"psnr_db_{stage}"] for row in found], ".2f") for stage in _VIDEOS),
                f"{fmean(row['packed_bytes'] for row in found):.0f}",
            ]
            table.append(cells)
        errors, videos = (f"error, {shown}" for shown in STAGES.values()), (f"PSNR in dB, {shown}" for shown in _VIDEOS)
        columns = ["profile", "runs in", *errors, *videos, "packed bytes"]
        lines += ["", f"## W{bits.weight}A{bits.activation}", "", *table_lines(columns, table)]
    return [
        *lines,
        "",
        f"Error: held out, |y - y_fp|^2 / |y_fp|^2, {head['samples']} inputs. PSNR: videos beside the full-precision "
        "model's, same captions and seeds.",
        "",
    ]


BENCHMARK = Benchmark(
    rows=profile_rows,
    table=profile_table,
    describe=describe,
    group=("seed", "bits", "profile"),
    real_weights=True,
)
