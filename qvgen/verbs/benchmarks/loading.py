"""The benchmark ``loading``: seconds of reading a packed directory, by part, of two sizes and so per GB of file.

The transformer has its full width and random codes; one block and ``blocks`` of its blocks are written for every width, by
:func:`save_packed`, and each round loads every directory once, after one load that is not counted. The time between the two
sizes, divided by the bytes between them, is what a file of any size takes per GB; what is left of the smaller one is fixed
(most of it is diffusers' table of positions). The files are in the page cache, as after a copy: a disk comes on top.
"""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from qvgen.config.bits import Bits
from qvgen.config.schema.train import TrainConfig
from qvgen.config.schema.verbs import BenchmarkConfig
from qvgen.deploy.checkpoint import load_timed, save_packed
from qvgen.deploy.manifest import WEIGHTS_FILE
from qvgen.deploy.packed_file import LoadSeconds
from qvgen.initializers.prepare import PrepareConfig
from qvgen.layers.layer_form import LayerForm
from qvgen.layers.noise_band import NoiseBand
from qvgen.layers.packed_linear import PackedLinear
from qvgen.layers.swap import packed_layers, select_linears
from qvgen.quant.grid import Profile
from qvgen.training.design.meta_model import build_transformer
from qvgen.verbs._parts import named_family
from qvgen.verbs.benchmarks.base import Benchmark

PARTS = ("hash", "build", "map", "prepack", "other")
_SMALL = 1


def loading_rows(config: BenchmarkConfig, *, done: Container[tuple[Any, ...]]) -> Iterator[dict[str, Any]]:
    """One row per number of threads and width; ``done`` holds ``(threads,)`` of those that are left out."""
    before = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        cells = {
            (width.label, blocks): _write(config.run, width, blocks, Path(folder) / f"{width.label}-{blocks}")
            for width in config.widths
            for blocks in (_SMALL, config.blocks)
        }
        gc.collect()
        gc.freeze()  # what was imported: to look through it before every load would take longer than a small load
        try:
            for threads in (number for number in config.threads if (number,) not in done):
                torch.set_num_threads(threads)
                yield from _measure(cells, config=config, threads=threads)
        finally:
            gc.unfreeze()
            torch.set_num_threads(before)


def profile_of(base: Profile, width: Bits) -> Profile:
    """A profile at other widths."""
    weight, activation = replace(base.weight, bits=width.weight), replace(base.activation, bits=width.activation)
    return replace(base, weight=weight, activation=activation)


def _write(config: TrainConfig, width: Bits, blocks: int, folder: Path) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        save_packed(random_packed(config, width, blocks=blocks), folder)
    return folder


@torch.no_grad()
def random_packed(config: TrainConfig, width: Bits, *, blocks: int) -> nn.Module:
    """A packed transformer of random codes that never had full-precision weights in its packed layers."""
    family = named_family(config).rebuild()
    model = build_transformer(family, blocks=blocks).requires_grad_(False)
    band = NoiseBand(PrepareConfig.num_noise_bands)
    form = LayerForm(profile=profile_of(config.profile, width))
    for name in select_linears(model, include=family.include, exclude=family.exclude).quantized:
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        shape = linear.in_features, linear.out_features
        packed = PackedLinear(*shape, bias=linear.bias is not None, form=form, noise_band=band, device="meta")
        model.set_submodule(name, packed)
    model.to_empty(device="cpu")
    for tensor in model.state_dict().values():
        tensor.fill_(0.5) if tensor.is_floating_point() else tensor.random_(0, 256)
    for layer in packed_layers(model).values():
        if width.weight > 4:
            layer.codes.bitwise_and_(2**width.weight - 1)
        if layer.weight_zero_point is not None and not layer.weight_zero_point.is_floating_point():
            layer.weight_zero_point.bitwise_and_(2**width.weight - 1)
    return model


def _measure(
    cells: Mapping[tuple[str, int], Path], *, config: BenchmarkConfig, threads: int
) -> Iterator[dict[str, Any]]:
    found: dict[tuple[str, int], list[dict[str, float]]] = {cell: [] for cell in cells}
    kernel = ""
    for turn in range(config.timed_steps + 1):
        for cell, folder in cells.items():
            seconds, peak, kernel = _load(folder, config.run.kernel)
            if turn:
                found[cell].append({**asdict(seconds), "cpu": seconds.cpu, **peak})
    for width in config.widths:
        rows = {"small": found[width.label, _SMALL], "large": found[width.label, config.blocks]}
        sizes = {
            name: (cells[width.label, blocks] / WEIGHTS_FILE).stat().st_size
            for name, blocks in (("small", _SMALL), ("large", config.blocks))
        }
        medians = {name: {key: median(row[key] for row in own) for key in own[0]} for name, own in rows.items()}
        step = sizes["large"] - sizes["small"]
        per_gb = {key: (medians["large"][key] - medians["small"][key]) / step * 1e9 for key in (*PARTS, "cpu", "wall")}
        yield {
            "variant": width.label,
            "threads": threads,
            "kernel": kernel,
            "blocks": {"small": _SMALL, "large": config.blocks},
            "bytes": sizes,
            "median_s": medians,
            "s_per_gb": per_gb,
            "fixed_s": {key: medians["small"][key] - per_gb[key] * sizes["small"] / 1e9 for key in ("cpu", "wall")},
            "loads": rows,
        }


def _load(folder: Path, kernel: str) -> tuple[LoadSeconds, dict[str, float], str]:
    """One load: its seconds, what its memory rose above the final one, and the backend."""
    gc.collect()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak begins anew
    model, seconds = load_timed(folder, kernel=kernel)
    memory = _memory()
    peak = {"peak_above_final_bytes": float(memory["VmHWM"] - memory["VmRSS"])} if memory else {}
    first = next(iter(packed_layers(model).values()))
    return seconds, peak, first.prepack_()


def _memory() -> dict[str, int]:
    """Bytes of the process now and at most; empty where the system does not say."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return {}
    pairs = [line.partition(":")[::2] for line in lines]
    return {key: 1024 * int(value.split()[0]) for key, value in pairs if key in ("VmHWM", "VmRSS")}


def loading_table(head: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The Markdown page."""

    def line(row: Mapping[str, Any]) -> str:
        per_gb, sizes = row["s_per_gb"], row["bytes"]
        large = row["median_s"]["large"]
        peak = large.get("peak_above_final_bytes")
        cells = [
            row["variant"],
            str(row["threads"]),
            f"{sizes['small'] / 1e6:.0f}, {sizes['large'] / 1e6:.0f}",
            f"{row['median_s']['small']['cpu']:.2f}, {large['cpu']:.2f}",
            f"**{per_gb['cpu']:.2f}**",
            *(f"{per_gb[part]:.2f}" for part in PARTS),
            f"{row['fixed_s']['cpu']:.2f}",
            f"{per_gb['wall']:.2f}",
            f"{row['fixed_s']['wall']:.2f}",
            "-" if peak is None else f"{peak / 1e6:.0f}",
        ]
        return f"| {' | '.join(cells)} |"

    columns = [
        "model", "threads", "file MB", "CPU s", "CPU s per GB", *PARTS, "fixed CPU s", "wall s per GB", "fixed wall s",
        "peak above final MB",
    ]  # fmt: skip
    blocks = rows[0]["blocks"]
    return [
        f"# Loading a packed {head['model']}, random codes",
        "",
        f"{head['machine']['cpu']}, torch {head['versions']['torch']}, kernel {rows[0]['kernel']}, "
        f"profile {head['profile']}.",
        f"Files of {blocks['small']} and {blocks['large']} blocks, in the page cache; medians of {head['timed_steps']} loads "
        "of each.",
        "Per GB (10^9 bytes of file) is the difference of the two sizes, by part; fixed is what is left for a file without "
        "bytes.",
        "A thread hashes the file while the transformer is built: CPU time counts both, wall time what takes longer.",
        "",
        f"    {head['command']}",
        "",
        f"| {' | '.join(columns)} |",
        "|---" * len(columns) + "|",
        *(line(row) for row in rows),
    ]


def _describe(config: BenchmarkConfig) -> str:
    """What would be measured."""
    widths = ", ".join(width.label for width in config.widths)
    return f"loading of {config.run.names.model}, {config.blocks} blocks: {widths}"


BENCHMARK = Benchmark(rows=loading_rows, table=loading_table, describe=_describe, group=("threads",), several_rows=True)
