"""The benchmark ``strategies``: bytes on each device for every number of GPUs and nodes, by the plan of the model's recipe.

Nothing is measured and no weight is read. A row is a world; its columns are the strategies. Micro-batches have the recipe's
size, and worlds that do not divide its batch are left out. The method is ``qvgen`` unless one that trains is chosen.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from qvgen.config.leaves import load_leaf
from qvgen.config.schema.train import TrainConfig
from qvgen.config.schema.verbs import BenchmarkConfig
from qvgen.training.design.meta_model import build_student
from qvgen.training.loss.prediction_loss import freeze_the_rest_
from qvgen.training.planning.memory import GIB, USABLE_SHARE, MemoryCounter, find_device
from qvgen.training.planning.strategy_choice import named
from qvgen.training.planning.training_plan import step_settings
from qvgen.verbs._parts import training_run
from qvgen.verbs.benchmarks.base import Benchmark, name_of_model, table_lines

WORLDS = ((1, 1), (1, 2), (1, 4), (1, 8), (2, 8), (4, 8))
"""Nodes, and GPUs of each."""
CARDS_GIB = (24, 48, 80, 139)
"""Memory of GPUs that people train on: of a 4090 to that of an H200."""


def worlds_of(config: TrainConfig) -> list[tuple[int, int]]:
    """Worlds that the batch can be divided over."""
    return [(nodes, devices) for nodes, devices in WORLDS if config.batch_size % (nodes * devices) == 0]


def strategies_rows(config: BenchmarkConfig, *, done: Container[tuple[Any, ...]]) -> Iterator[dict[str, Any]]:
    """One row per world."""
    device, run = find_device(CARDS_GIB[-1], devices=1), replace(config.run, steps=config.run.steps or 100)
    if run.method.trains == "nothing":
        run = replace(run, method=load_leaf("method", "qvgen"))
    counter: MemoryCounter | None = None
    size = run.batch_size // (run.accumulate * run.world_size)  # samples that a device works on at once
    for nodes, devices in worlds_of(run):
        if (nodes, devices) in done:
            continue
        share = run.batch_size // (nodes * devices)
        accumulate = share // size if share % size == 0 else 1
        planned = replace(
            run, devices=devices, num_nodes=nodes, accumulate=accumulate, strategy=named(run.strategy, "auto")
        )
        training = training_run(planned)
        if counter is None:
            student, _ = build_student(training.model.rebuild(), training.design)
            freeze_the_rest_(student, method=training.design.method, optim=training.steps.optim)
            counter = MemoryCounter(training, student)
        names = ["single"] if nodes * devices == 1 else ["ddp", "fsdp", *(["hsdp"] if nodes > 1 else [])]
        settings, found = step_settings(training, device), {}
        for name in names:
            shards = replace(training, strategy=named(run.strategy, name)).shards
            found[name] = counter.total(settings, shards=shards)
        yield {"nodes": nodes, "devices": devices, "micro_batch": settings.micro_batch, "bytes": found}


def strategies_table(head: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The Markdown page."""
    columns = ["nodes x GPUs", "at once", "strategy", "GiB of each GPU", *(f"{card} GiB" for card in CARDS_GIB)]
    lines = []
    for row in rows:
        for name, nbytes in row["bytes"].items():
            fits = ["fits" if nbytes <= USABLE_SHARE * card * GIB else "-" for card in CARDS_GIB]
            world = f"{row['nodes']} x {row['devices']}"
            lines.append([world, str(row["micro_batch"]), name, f"{nbytes / GIB:.1f}", *fits])
    return [
        f"# Which strategy fits {head['model']} on which GPUs, predicted, not measured",
        "",
        "Counted by the plan of the model's recipe (docs/planning.md says how), for a GPU's bfloat16 autocast over float32 "
        f"weights. A GPU holds what {USABLE_SHARE:.0%} of its memory holds. At once: samples of a micro-batch.",
        "",
        f"    {head['command']}",
        "",
        *table_lines(columns, lines),
    ]


BENCHMARK = Benchmark(
    rows=strategies_rows,
    table=strategies_table,
    describe=lambda config: (
        f"strategies of {config.run.names.model} on "
        + ", ".join(f"{nodes} x {devices}" for nodes, devices in worlds_of(config.run))
        + " GPUs"
    ),
    subject=name_of_model,
    group=("nodes", "devices"),
)
