"""The benchmark ``kernels``: packed linears beside torch's own and other libraries'; with tune=true tiles of a GPU."""

from collections.abc import Container, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from qvgen.config.schema.verbs import BenchmarkConfig
from qvgen.verbs.benchmarks.base import Benchmark, Group, Row, cpu_kernel, shapes_of
from qvgen.verbs.benchmarks.kernels.page import kernel_table, plot
from qvgen.verbs.benchmarks.kernels.rows import kernel_rows
from qvgen.verbs.benchmarks.kernels.tiles import tile_rows, tile_table

__all__ = ["BENCHMARK"]


def _describe(config: BenchmarkConfig) -> str:
    """What would be measured."""
    if config.tune:
        widths = ", ".join(width.label for width in config.widths)
        return f"kernels: tiles of the GPU kernels for {', '.join(shapes_of(config))} at {widths}, for this GPU's table"
    return f"kernels: shapes {', '.join(shapes_of(config))} on {list(config.threads)} threads"


def _subject(config: BenchmarkConfig) -> str:
    """The kernel that this processor runs, or the card whose tiles are measured."""
    if not config.tune:
        return f"cpu-{cpu_kernel()}"
    name = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "no card"
    return f"tiles-{name.lower().replace(' ', '-').replace('/', '-')}"


def _rows(config: BenchmarkConfig, *, done: Container[Group]) -> Iterator[dict[str, Any]]:
    return tile_rows(config, done=done) if config.tune else kernel_rows(config, done=done)


def _table(head: Row, rows: Sequence[Row]) -> list[str]:
    return tile_table(head, rows) if _are_tiles(rows) else kernel_table(head, rows)


def _plot(rows: Sequence[Row], path: Path) -> None:
    if not _are_tiles(rows):
        plot(rows, path)


def _are_tiles(rows: Sequence[Row]) -> bool:
    return all("tail" in row for row in rows)


BENCHMARK = Benchmark(
    rows=_rows,
    table=_table,
    describe=_describe,
    subject=_subject,
    group=("shape",),
    shapes=(
        "1024x1920-1920",
        "4096x1920-1920",
        "4096x1920-7680",
        "4096x7680-1920",
        "17776x1920-7680",
        "4096x1920-7680-1920",
    ),
    several_rows=True,
    plot=_plot,
)
