"""The benchmark ``ptq``: every PTQ method at several bit-widths, without training, on one model."""

from __future__ import annotations

import time
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from statistics import fmean
from typing import Any

from torch import Tensor, nn

from qvgen.config.bits import Bits
from qvgen.config.leaves import load_leaf
from qvgen.config.schema import TrainConfig
from qvgen.config.verb_schema import BenchmarkConfig
from qvgen.evaluation.comparison import generate_videos, held_out_items
from qvgen.evaluation.held_out import HeldOut
from qvgen.evaluation.metrics import psnr_db
from qvgen.initializers.clip_search import start_clips_
from qvgen.initializers.prepare import initialize_
from qvgen.layers.shared_input import unshare_activations_
from qvgen.layers.swap import folded_copy, quantized_layers
from qvgen.training.layer_setup import input_sets
from qvgen.training.student import calibrate_, prepare_student
from qvgen.verbs._parts import ptq_method, sampled_teacher, step_batch, student_design
from qvgen.verbs.benchmarks.base import Benchmark, methods_of


def ptq_rows(config: BenchmarkConfig, *, done: Container[tuple[Any, ...]]) -> Iterator[dict[str, Any]]:
    """One row per seed, bit-width and method, in this order; ``done`` holds those triples that are left out."""
    for seed in config.seeds:
        cells = [(width, name) for width in config.widths for name in methods_of(config)]
        missing = [(width, name) for width, name in cells if (seed, width.label, name) not in done]
        if not missing:
            continue
        base = replace(config.run, seed=seed)
        teacher = base.model.load_teacher()
        split = base.data.open(base.model, split="held_out")
        batch_size = step_batch(base).micro_batch_size
        held_out = HeldOut(base.model, split, num_samples=base.evaluation.samples, seed=seed, batch_size=batch_size)
        reference = list(held_out.predictions(teacher))
        captions = [item["caption"] for item in held_out_items(split, config.videos)]
        seeds = [seed + index for index in range(config.videos)]
        videos = generate_videos(base.model, teacher, captions, seeds, encode=split.encode)

        def measure(
            model: nn.Module,
            *,
            base: TrainConfig = base,
            held_out: HeldOut = held_out,
            reference: Sequence[Tensor] = reference,
            shown: tuple[list[str], list[int], Tensor] = (captions, seeds, videos),
        ) -> dict[str, float]:
            found = generate_videos(base.model, model, *shown[:2], encode=held_out.split.encode)
            return {
                "relative_error": held_out.relative_error(model, list(reference)),
                "psnr_db": psnr_db(found, shown[2], max_value=255),
            }

        for width, method in missing:
            row = {"method": method, "bits": width.label, "seed": seed}
            student, facts = _quantized(cell(base, method, width), teacher=teacher, held_out=held_out)
            yield {**row, **facts, **measure(student), "bytes": _bytes(student)}


def cell(base: TrainConfig, method: str, width: Bits) -> TrainConfig:
    """The configuration of one method at one bit-width."""
    name, _, rotation = method.partition("+r")
    profile = replace(
        base.profile,
        rotation=int(rotation) if rotation else base.profile.rotation,
        weight=replace(base.profile.weight, bits=width.weight),
        activation=replace(base.profile.activation, bits=width.activation),
    )
    return replace(
        base, bits=width, profile=profile, init=load_leaf("init", name), names=replace(base.names, init=name)
    )


def _quantized(config: TrainConfig, *, teacher: nn.Module, held_out: HeldOut) -> tuple[nn.Module, dict[str, float]]:
    """A student that the cell's method has set up; the seconds that calibration and method took, and its mean bits."""
    student, _ = prepare_student(config.model, student_design(config), seed=config.seed)
    unshare_activations_(quantized_layers(student))  # as before every PTQ method
    began = time.monotonic()
    sampled = sampled_teacher(config, teacher, encode=held_out.split.encode)
    statistics, allocation = calibrate_(student, ptq_method(config), profile=config.profile, teacher=sampled)
    if statistics is not None:
        statistics(next(iter(quantized_layers(student))))  # all layers of a pass are collected by the first one
    calibrated = time.monotonic()
    folds = config.model.smoothing_folds(student)
    seen = initialize_(student, config.init, seed=config.seed, statistics=statistics, folds=folds)
    if seen is not None and ptq_method(config).searches_clips:
        start_clips_(quantized_layers(student), input_sets(student, config.model), statistics=seen)
    seconds = {"calibration_s": calibrated - began, "method_s": time.monotonic() - calibrated}
    mean = allocation.mean_bits if allocation is not None else asdict(config.bits)
    return student, {**seconds, "mean_weight_bits": mean["weight"], "mean_activation_bits": mean["activation"]}


def _bytes(student: nn.Module) -> int:
    """Of all tensors of the packed model."""
    return sum(value.numel() * value.element_size() for value in folded_copy(student).state_dict().values())


def ptq_table(head: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The Markdown page: mean over the seeds, and half the spread between the smallest and the largest."""
    methods, widths = (
        list(dict.fromkeys(row["method"] for row in rows)),
        list(dict.fromkeys(row["bits"] for row in rows)),
    )
    seeds = sorted({row["seed"] for row in rows})
    names = [f"W{Bits.parse(width).weight}A{Bits.parse(width).activation}" for width in widths]

    def cells(method: str, key: str, form: str) -> list[str]:
        found = [[row[key] for row in rows if (row["method"], row["bits"]) == (method, width)] for width in widths]
        return [f"{fmean(values):{form}} +- {(max(values) - min(values)) / 2:{form}}" for values in found]

    def table(key: str, form: str) -> list[str]:
        lines = [f"| method | {' | '.join(names)} |", "|---" * (len(widths) + 1) + "|"]
        return [*lines, *(f"| {method} | {' | '.join(cells(method, key, form))} |" for method in methods), ""]

    seconds = [
        f"| {method} | {max(row['calibration_s'] for row in rows if row['method'] == method):.2f} | "
        f"{fmean(row['method_s'] for row in rows if row['method'] == method):.2f} |"
        for method in methods
    ]
    return [
        f"# PTQ methods on {head['model']}",
        "",
        f"Profile {head['profile']}, no training. Mean over the seeds {', '.join(map(str, seeds))}, +- half the spread. "
        f"{head['machine']['cpu']}, {head['machine']['num_threads']} thread, torch {head['versions']['torch']}. "
        "A method's calibration is sampled once per seed and read from the cache afterwards.",
        "",
        f"    {head['command']}",
        "",
        f"## Held-out relative error |y - y_fp|^2 / |y_fp|^2, {head['samples']} inputs",
        "",
        *table("relative_error", ".5f"),
        f"## PSNR in dB of {head['videos']} videos to the full-precision model's, same captions and seeds",
        "",
        *table("psnr_db", ".2f"),
        "## Bytes of the packed model, whole transformer",
        "",
        *table("bytes", ".0f"),
        "## Seconds",
        "",
        "| method | calibration (largest of all cells) | method, mean |",
        "|---|---|---|",
        *seconds,
    ]


BENCHMARK = Benchmark(rows=ptq_rows, table=ptq_table, group=("seed", "bits", "method"), real_weights=True)
