"""What a benchmark is: rows of measured values, the page that is made of them, and the name of its files.

The file or folder NAME of this room holds the benchmark ``NAME`` as ``BENCHMARK``; it is found by that name and imported when
it is asked for, so that a benchmark whose libraries are missing keeps no other one from running.
"""

from __future__ import annotations

import pkgutil
import re
import time
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from statistics import fmean, median
from typing import Any, Protocol

import torch

from qvgen.config.bits import Bits
from qvgen.config.leaves import leaf_names, load_leaf
from qvgen.config.schema.verbs import BenchmarkConfig
from qvgen.errors import UserError
from qvgen.training.freed_memory import keep_freed_memory
from qvgen.verbs import benchmarks
from qvgen_kernels import LinearSpec, resolve_kernel
from qvgen_kernels.cpu_library import BACKENDS, library, supported

Row = Mapping[str, Any]
Group = tuple[Any, ...]


class MeasureRows(Protocol):
    """What measures."""

    def __call__(self, config: BenchmarkConfig, *, done: Container[Group]) -> Iterator[dict[str, Any]]:
        """Rows of all groups but those in ``done``."""
        ...


def methods_of(config: BenchmarkConfig) -> list[str]:
    """The methods that are compared: those that were asked for, or all that there are.

    A method may say by ``compared_rotations`` that it is to be measured with rotated layers too.
    """
    if config.methods is not None:
        return list(config.methods)
    found = []
    for name in leaf_names("init"):
        rotations = getattr(load_leaf("init", name), "compared_rotations", ())
        found += [name, *(f"{name}+r{rotation}" for rotation in rotations)]
    return found


def init_leaves(config: BenchmarkConfig) -> list[object]:
    """The PTQ methods that are compared, without their rotations."""
    return [load_leaf("init", name.partition("+")[0]) for name in methods_of(config)]


def timed_cells(config: BenchmarkConfig, subjects: Iterable[str]) -> Iterator[tuple[str, Bits, int]]:
    """Every subject, bit-width and number of threads, in this order; torch has so many threads meanwhile."""
    before = torch.get_num_threads()
    keep_freed_memory()
    try:
        for subject in subjects:
            for width in config.widths:
                for threads in config.threads:
                    torch.set_num_threads(threads)
                    yield subject, width, threads
    finally:
        torch.set_num_threads(before)


def of_rounds(ratios: Sequence[float]) -> list[float]:
    """The lowest, the median and the highest of the rounds' ratios."""
    return [min(ratios), median(ratios), max(ratios)]


def shown_rounds(ratios: Sequence[float]) -> str:
    """What :func:`of_rounds` gave, for a page."""
    low, middle, high = ratios
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def table_lines(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A Markdown table."""
    return [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|", *(f"| {' | '.join(cells)} |" for cells in rows)]


def about_seeds(head: Row, seeds: Sequence[int]) -> str:
    """What a page's numbers are means of, and where they were measured."""
    several = len(seeds) > 1
    return (
        f"{'Mean over the seeds' if several else 'One seed:'} {', '.join(map(str, seeds))}"
        f"{', +- half the spread' if several else ''}. {head['machine']['cpu']}, "
        f"{head['machine']['num_threads']} thread, torch {head['versions']['torch']}."
    )


def mean_and_spread(values: Sequence[float | None], form: str) -> str:
    """The mean of what was measured, and half the spread between the smallest and the largest."""
    measured = [value for value in values if value is not None]
    if not measured:
        return "-"
    if len(measured) == 1:
        return f"{measured[0]:{form}}"
    return f"{fmean(measured):{form}} +- {(max(measured) - min(measured)) / 2:{form.lstrip('+')}}"


def cells(config: BenchmarkConfig) -> str:
    """What a benchmark of methods, bit-widths and seeds would measure, for a dry run."""
    methods = methods_of(config)
    count = len(methods) * len(config.widths) * len(config.seeds)
    return f"{config.what} on {config.model_name}: {count} cells ({', '.join(methods)})"


def name_of_model(config: BenchmarkConfig) -> str:
    """The model's name, for the names of files."""
    return config.model_name


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


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """One benchmark.

    Attributes:
        rows: Measures; every row is a mapping that JSON can hold, given as soon as it is there. Groups in ``done`` are left
            out: an earlier call, which was stopped, measured them.
        table: The head of the result's JSON and its rows -> the lines of the page.
        describe: What it would measure, in one line, for a dry run.
        subject: What the result is of, as the end of its files' names.
        group: Columns that name what is measured at once; a row without one of them has None there.
        several_rows: Whether a group has several rows, so that the last one of a call that was stopped may lack some.
        plot: Rows and path -> a picture beside the page; None: there is none.
        leaves: What is compared besides code of ours: a result of other sources is another result.
        real_weights: Whether the model's own weights are read, so that their revision belongs to the result.
        shapes: What is measured where no ``shapes`` are asked for, in the benchmark's own form; empty: it has none.
    """

    rows: MeasureRows
    table: Callable[[Row, Sequence[Row]], list[str]]
    describe: Callable[[BenchmarkConfig], str] = cells
    subject: Callable[[BenchmarkConfig], str] = name_of_model
    group: tuple[str, ...]
    several_rows: bool = False
    plot: Callable[[Sequence[Row], Path], None] | None = None
    leaves: Callable[[BenchmarkConfig], list[object]] = init_leaves
    real_weights: bool = False
    shapes: tuple[str, ...] = ()


def shapes_of(config: BenchmarkConfig) -> tuple[str, ...]:
    """The shapes that were asked for, or those of the benchmark."""
    return load_benchmark(config.what).shapes if config.shapes is None else config.shapes


def integer_rates() -> dict[str, float]:
    """GOP/s of one core's integer instructions, operands in the first-level cache, of each CPU backend that runs here."""
    found = {}
    for name, number in BACKENDS.items():
        if supported(name) is None:
            found[name] = max(_rate(number) for _ in range(5))  # the best: a limit, whatever else the machine did
    return found


def _rate(backend: int) -> float:
    began = time.process_time()
    operations = library().qv_exercise(backend, 5000)
    return float(operations / (time.process_time() - began) / 1e9)


def cpu_kernel() -> str:
    """The kernel that ``auto`` chooses on this processor, for the names of files that hold times."""
    return resolve_kernel("auto", LinearSpec(in_features=64, out_features=32, weight_bits=4, activation_bits=4)).name


def benchmark_names() -> list[str]:
    """Names of all benchmarks."""
    own = __name__.rpartition(".")[2]
    names = (module.name for module in pkgutil.iter_modules(benchmarks.__path__))
    return sorted(name for name in names if name != own and not name.startswith("_"))


def load_benchmark(name: str) -> Benchmark:
    """Import a benchmark.

    Raises:
        ValueError: There is none of that name.
    """
    if name not in (names := benchmark_names()):
        raise UserError(f"what={name} is unknown (there are: {', '.join(names)})")
    found: Benchmark = import_module(f"{benchmarks.__name__}.{name}").BENCHMARK
    return found
