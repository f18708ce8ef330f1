"""The benchmark ``attention``: one head's attention in 8 bits beside torch's, interleaved in one process.

A shape is TOKENSxD, as 4276x64: so many queries, keys and values of one head of D elements. In every round each candidate
runs once, in turn; a ratio is the median of the rounds' ratios to torch's attention in bfloat16, so that what slows the
machine down for a while falls on both. Times are processor time of the calling thread where one thread runs, and wall time
otherwise.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from functools import partial
from statistics import median
from typing import Any, get_args

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from qvgen.config.schema.verbs import BenchmarkConfig
from qvgen.quant.attention_profile import AttentionKind
from qvgen.verbs.benchmarks.base import (
    Benchmark,
    cpu_kernel,
    integer_rates,
    of_rounds,
    shapes_of,
    shown_rounds,
    table_lines,
    timed_cells,
)
from qvgen_kernels.attention import AttentionSpec, attention, attention_kernels

_SLOW = ("reference", "portable")
_BASE = "torch bfloat16"


def _parse(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if found is None:
        raise ValueError(f"shapes holds {text!r}; write TOKENSxD of one head, as 4276x64")
    return int(found[1]), AttentionSpec(int(found[2])).head_size


def attention_rows(config: BenchmarkConfig, *, done: Container[tuple[Any, ...]]) -> Iterator[dict[str, Any]]:
    """One row per shape and number of threads.

    Raises:
        ValueError: A shape of another form, or a size of heads that there is no attention for.
    """
    for text in shapes_of(config):
        _parse(text)
    first, peak = config.widths[0], max(integer_rates().values())
    for text, width, threads in timed_cells(config, [text for text in shapes_of(config) if (text,) not in done]):
        if width == first:  # bit-widths are those of Linears
            yield {**_measure(text, threads, config), "core_peak_gops": peak}


def _candidates(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Callable[[], Tensor]]:
    narrow = [tensor.bfloat16() for tensor in (q, k, v)]

    def packed(kind: AttentionKind, kernel: str) -> Callable[[], Tensor]:
        return partial(attention, *narrow, spec=AttentionSpec(q.shape[-1], kind=kind), kernel=kernel)

    kernels = [name for name, reason in attention_kernels(q.device).items() if reason is None and name not in _SLOW]
    return {
        _BASE: lambda: scaled_dot_product_attention(*narrow),
        "torch float32": lambda: scaled_dot_product_attention(q, k, v),
        **{f"{kind} {name}": packed(kind, name) for kind in get_args(AttentionKind) for name in kernels},
    }


@torch.no_grad()
def _measure(text: str, threads: int, config: BenchmarkConfig) -> dict[str, Any]:
    tokens, size = _parse(text)
    generator = torch.Generator().manual_seed(config.run.seed)
    q, k, v = (torch.randn(1, 1, tokens, size, generator=generator) for _ in range(3))
    clock = time.thread_time if threads == 1 else time.perf_counter
    candidates = _candidates(q, k, v)
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for number in range(config.timed_steps + 1):
        for name, run in candidates.items():
            began = clock()
            run()
            if number:  # the first round warms up
                seconds[name].append(clock() - began)
    operations = 4.0 * tokens * tokens * size
    return {
        "shape": text,
        "threads": threads,
        "seconds": seconds,
        "gops": {name: operations / median(own) / 1e9 for name, own in seconds.items()},
        "speedup": {
            name: of_rounds([a / b for a, b in zip(seconds[_BASE], own, strict=True)]) for name, own in seconds.items()
        },
    }


def attention_table(head: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The Markdown page."""
    return [
        "# Attention of one head in 8 bits",
        "",
        f"{head['machine']['cpu']}, torch {head['versions']['torch']}. Quantization of queries, keys and values included. "
        f"Medians of {head['timed_steps']} interleaved rounds in one process. Operations are 4 D a pair of tokens. "
        "The last column is the time of torch's attention in bfloat16 over the candidate's: median of the rounds' ratios "
        "(lowest to highest). The peak is what the integer instructions of as many cores do whose operands lie in the "
        f"first-level cache: {rows[0]['core_peak_gops']:.0f} GOP/s of one core.",
        "",
        f"    {head['command']}",
        "",
        *table_lines(["tokens x D", "threads", "attention", "ms", "GOP/s", "of the peak", "speedup"], _lines(rows)),
    ]


def _lines(rows: Sequence[Mapping[str, Any]]) -> Iterator[list[str]]:
    for row in rows:
        for name, seconds in row["seconds"].items():
            yield [
                row["shape"],
                str(row["threads"]),
                name,
                f"{1000 * median(seconds):.1f}",
                f"{row['gops'][name]:.0f}",
                f"{row['gops'][name] / row['core_peak_gops'] / row['threads']:.0%}" if name.startswith("int8") else "-",
                shown_rounds(row["speedup"][name]),
            ]


def _describe(config: BenchmarkConfig) -> str:
    """What would be measured."""
    return f"attention: shapes {', '.join(shapes_of(config))} on {list(config.threads)} threads"


BENCHMARK = Benchmark(
    rows=attention_rows,
    table=attention_table,
    describe=_describe,
    subject=lambda _: f"cpu-{cpu_kernel()}",
    group=("shape",),
    shapes=("4276x64", "4276x128", "17776x64", "17776x128"),
    several_rows=True,
)
