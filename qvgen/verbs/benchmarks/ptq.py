"""The benchmark ``ptq``: every PTQ method at several bit-widths, without training, on one video model or text encoder."""

from __future__ import annotations

import time
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from operator import itemgetter
from statistics import fmean
from typing import Any, Protocol

from torch import Tensor, nn

from qvgen.config.bits import Bits
from qvgen.config.leaves import load_leaf
from qvgen.config.prompts.image_prompt import caption_of
from qvgen.config.schema.train import TrainConfig
from qvgen.config.schema.verbs import BenchmarkConfig
from qvgen.evaluation.distance import psnr_db
from qvgen.evaluation.held_out import HeldOut
from qvgen.evaluation.sampling import generate_videos, held_out_items
from qvgen.initializers.clip_search import start_clips_
from qvgen.initializers.prepare import initialize_
from qvgen.layers.shared_input import unshare_activations_
from qvgen.layers.swap import folded_copy, quantized_layers
from qvgen.training.design.layer_setup import input_sets
from qvgen.training.start.run_calibration import calibrate_
from qvgen.training.start.student import prepare_student
from qvgen.verbs._parts import ptq_method, sampled_teacher, step_batch, student_design
from qvgen.verbs._ptq_encoder import ABOUT_ENCODER, encoder_cells, encoder_folder, encoder_methods, encoder_rows
from qvgen.verbs.benchmarks.base import Benchmark, Row, cells, methods_of


class Table(Protocol):
    """A value of every row, by its key or computed from it, and its format -> lines of a table, methods by widths."""

    def __call__(self, value: str | Callable[[Row], float], form: str) -> list[str]:
        """The lines."""
        ...


def ptq_rows(config: BenchmarkConfig, *, done: Container[tuple[Any, ...]]) -> Iterator[dict[str, Any]]:
    """One row per seed, bit-width and method, in this order; ``done`` holds those triples that are left out."""
    if config.encoder is not None:
        yield from encoder_rows(config, done=done, cell=cell)
        return
    for seed in config.seeds:
        pairs = [(width, name) for width in config.widths for name in methods_of(config)]
        missing = [(width, name) for width, name in pairs if (seed, width.label, name) not in done]
        if not missing:
            continue
        base = replace(config.run, seed=seed)
        teacher = base.model.load_teacher()
        split = base.data.open(base.model, split="held_out")
        batch_size = step_batch(base).micro_batch_size
        held_out = HeldOut(base.model, split, num_samples=base.evaluation.samples, batch_size=batch_size)
        reference = list(held_out.predictions(teacher))
        captions = [caption_of(item) for item in held_out_items(split, config.videos)]
        seeds = [held_out.seed + index for index in range(config.videos)]
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

    def values(method: str, value: Callable[[Row], float], form: str) -> list[str]:
        found = [[value(row) for row in rows if (row["method"], row["bits"]) == (method, width)] for width in widths]
        return [f"{fmean(several):{form}} +- {(max(several) - min(several)) / 2:{form}}" for several in found]

    def table(value: str | Callable[[Row], float], form: str) -> list[str]:
        read = itemgetter(value) if isinstance(value, str) else value
        lines = [f"| method | {' | '.join(names)} |", "|---" * (len(widths) + 1) + "|"]
        return [*lines, *(f"| {method} | {' | '.join(values(method, read, form))} |" for method in methods), ""]

    seconds = [
        f"| {method} | {max(row['calibration_s'] for row in rows if row['method'] == method):.2f} | "
        f"{fmean(row['method_s'] for row in rows if row['method'] == method):.2f} |"
        for method in methods
    ]
    is_encoder = "cosine" in rows[0]
    measured = _encoder_sections(rows, table) if is_encoder else _video_sections(head, table)
    return [
        f"# PTQ methods on {head['model']}",
        "",
        f"Profile {head['profile']}, no training. Mean over the seeds {', '.join(map(str, seeds))}, +- half the spread. "
        f"{head['machine']['cpu']}, {head['machine']['num_threads']} thread, torch {head['versions']['torch']}. "
        "A method's calibration is sampled once per seed and read from the cache afterwards."
        + (f" {ABOUT_ENCODER}" if is_encoder else ""),
        "",
        f"    {head['command']}",
        "",
        *measured,
        f"## Bytes of the packed model, whole {'encoder' if is_encoder else 'transformer'}",
        "",
        *table("bytes", ".0f"),
        "## Seconds",
        "",
        "| method | calibration (largest of all cells) | method, mean |",
        "|---|---|---|",
        *seconds,
    ]


def _video_sections(head: Mapping[str, Any], table: Table) -> list[str]:
    return [
        f"## Held-out relative error |y - y_fp|^2 / |y_fp|^2, {head['samples']} inputs",
        "",
        *table("relative_error", ".5f"),
        f"## PSNR in dB of {head['videos']} videos to the full-precision model's, same captions and seeds",
        "",
        *table("psnr_db", ".2f"),
    ]


def _encoder_sections(rows: Sequence[Row], table: Table) -> list[str]:
    lines = [
        "## Relative error of token states |y - y_fp|^2 / |y_fp|^2",
        "",
        *table("relative_error", ".5f"),
        "## Cosine of the sentence embedding to the full-precision one",
        "",
        *table("cosine", ".5f"),
    ]
    for kind in rows[0]["layers"]:
        title = f"## Relative error of {kind}, mean over the blocks"
        lines += [title, "", *table(partial(_of_layers, kind=kind), ".5f")]
    return lines


def _of_layers(row: Row, *, kind: str) -> float:
    return float(row["layers"][kind])


def describe(config: BenchmarkConfig) -> str:
    """What it would measure, for a dry run."""
    if config.encoder is None:
        return cells(config)
    methods = ", ".join(encoder_methods(config))
    encoder_folder(config.encoder)  # it says what is missing
    return f"ptq on {config.model_name}: {len(encoder_cells(config))} cells ({methods})"


BENCHMARK = Benchmark(
    rows=ptq_rows, table=ptq_table, describe=describe, group=("seed", "bits", "method"), real_weights=True
)
