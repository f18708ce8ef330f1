"""Rows of a benchmark that was stopped: the same command keeps those of its whole groups and measures the others.

    out/NAME.json    {..., "unfinished": what its rows are made from, "rows": [...]}; without that key all rows are there

A group is what is measured at once, and not cut: one row, or all rows of a shape or of a number of threads.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qvgen.config.run_comparison import lasting
from qvgen.config.schema.verbs import BenchmarkConfig
from qvgen.evaluation.environment import collect_machine
from qvgen.evaluation.sentence_encoder import revision
from qvgen.training.identity import code_facts
from qvgen.training.source_checksum import sources_of
from qvgen.verbs._ptq_encoder import encoder_folder
from qvgen.verbs.benchmarks.base import Benchmark, methods_of

Row = dict[str, Any]
Group = tuple[Any, ...]

UNFINISHED = "unfinished"


@dataclass(frozen=True)
class UnfinishedRows:
    """What an earlier call of the same command left.

    Attributes:
        rows: Of the groups that are whole, in their order.
        groups: These groups.
        found: Whether such a call was stopped here.
    """

    rows: tuple[Row, ...]
    groups: frozenset[Group]
    found: bool

    @classmethod
    def read(cls, path: Path, config: BenchmarkConfig, benchmark: Benchmark) -> UnfinishedRows:
        """What is in a file.

        Args:
            path: NAME.json; it need not exist.
            config: The present command's.
            benchmark: Says what a group is.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            rows, of = [dict(row) for row in content["rows"]], content[UNFINISHED]
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return cls((), frozenset(), found=False)
        if not rows or of != command_key(config, benchmark):
            return cls((), frozenset(), found=False)
        groups = [tuple(row.get(key) for key in benchmark.group) for row in rows]
        whole = frozenset(groups) - ({groups[-1]} if benchmark.several_rows else set())
        kept = tuple(row for row, group in zip(rows, groups, strict=True) if group in whole)
        return cls(kept, whole, found=True)


def command_key(config: BenchmarkConfig, benchmark: Benchmark) -> str:
    """What rows are made from: a command's settings, the code, the processor; weights where they count."""
    methods = methods_of(config)
    own = [
        config.what, methods, config.profiles, [width.label for width in config.widths], config.seeds, config.videos,
        config.timed_steps, config.shapes, config.threads, config.blocks, config.encoder,
    ]  # fmt: skip
    weights = revision_of(config) if benchmark.real_weights else None
    code = [code_facts(config.run.plain), *map(sources_of, benchmark.leaves(config))]
    parts = [code, collect_machine().cpu, weights, lasting(config.run.plain), own]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def revision_of(config: BenchmarkConfig) -> str:
    """Which weights are measured."""
    if config.encoder is None:
        return str(config.run.model.revision)
    return revision(encoder_folder(config.encoder))
