"""The benchmark ``step_traffic``: what a step asks of a GPU, counted, and what quantization and Phi add to it, modelled.

Nothing is measured and no weight is read: the models have full size and no values, so that any machine counts a model of 14
billion parameters. Two short models are counted and continued to the whole one. The variants are

    plain        distillation without quantization
    quantized    its Linears fake-quantized
    with Phi     and with helper modules of the configured rank
    unfused      the same without the fused operators, by torch's own

each with the run's gradient checkpointing, in bfloat16 autocast over float32 weights, beside the run's teacher. The
optimizer is left out: it comes once in a step, after all micro-batches.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import asdict, astuple, replace
from typing import Any

import torch
from torch import nn

from qvgen.config.leaves import load_leaf
from qvgen.config.schema.train import TrainConfig
from qvgen.config.schema.verbs import BenchmarkConfig
from qvgen.errors import UserError
from qvgen.training.design.meta_model import build_student, build_teacher, build_transformer, fill_, num_blocks
from qvgen.training.planning.counted_step import StepSettings, continued, run_step
from qvgen.training.planning.memory import teacher_dtype
from qvgen.training.planning.step_traffic import H200, Traffic, TrafficOperators
from qvgen.verbs._parts import student_design
from qvgen.verbs.benchmarks.base import Benchmark, name_of_model
from qvgen.verbs.benchmarks.loading import profile_of
from qvgen_kernels.fake_quantize import missing_reason

VARIANTS = {"plain": "kd", "quantized": "kd", "with Phi": "qvgen", "unfused": "qvgen"}
"""Variant -> the method whose loss and, but for the plain one, whose layers it has."""


def step_traffic_rows(config: BenchmarkConfig, *, done: Container[tuple[Any, ...]]) -> Iterator[dict[str, Any]]:
    """One row per width.

    Raises:
        UserError: The fused operators can't be counted, because this machine has none.
    """
    if (reason := missing_reason("cpu")) is not None:
        raise UserError(f"fused operators are counted by those of this machine's CPU, which it lacks: {reason}")
    widths = [width for width in config.widths if (width.label,) not in done]
    plain: Traffic | None = None  # it has no width: counted once
    for width in widths:
        profile = profile_of(config.run.profile, width)
        run = replace(config.run, bits=width, profile=profile, steps=100)
        plain = plain or count_traffic(run, "plain")
        counted = {"plain": plain} | {name: count_traffic(run, name) for name in VARIANTS if name != "plain"}
        yield {
            "bits": width.label,
            "tokens_of": list(run.model.sample_shape),
            "traffic": {name: asdict(traffic) for name, traffic in counted.items()},
            "seconds": {name: traffic.seconds for name, traffic in counted.items()},
            "ratios": {name: traffic.seconds / plain.seconds for name, traffic in counted.items()},
        }


def count_traffic(run: TrainConfig, variant: str) -> Traffic:
    """One micro-batch of one sample of the whole model."""
    blocks = num_blocks(run.model)
    counts = [astuple(count_blocks_traffic(run, variant, blocks=number)) for number in (1, 2)]
    whole = continued(counts, blocks=blocks)
    assert whole is not None, "two counts always continue"
    names = list(Traffic.__dataclass_fields__)
    return Traffic(**dict(zip(names, whole, strict=True)))


def count_blocks_traffic(run: TrainConfig, variant: str, *, blocks: int) -> Traffic:
    """One micro-batch of one sample of a model of so many blocks."""
    method = load_leaf("method", VARIANTS[variant])
    family: Any = run.model
    student: nn.Module
    if variant == "plain":
        student = build_transformer(family, blocks=blocks).train()
    else:
        student, _ = build_student(family, student_design(replace(run, method=method)), blocks=blocks)
    dtype = teacher_dtype(family)
    models = [student, build_teacher(family, dtype=dtype, blocks=blocks)]
    for model in models:
        fill_(model)
    settings = StepSettings(
        micro_batch=1,
        gradient_checkpointing=run.strategy.gradient_checkpointing,
        keep_attention=run.strategy.gradient_checkpointing and run.strategy.keep_attention,
        autocast=True,
        teacher_dtype=dtype,
    )
    operators = TrafficOperators(H200, sees_fused=variant != "unfused")
    run_step(family, settings, models=models, method=method, optim=run.optim, operators=operators)
    return operators.traffic()


def step_traffic_table(head: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The Markdown page."""
    device = H200
    columns = ["bits", "variant", "kernels", "products PFLOP", "attention PFLOP", "other GB", "seconds", "ratio"]
    return [
        f"# What quantization adds to a training step of {head['model']}, predicted, not measured",
        "",
        f"Counted on tensors without values: one micro-batch of one sample, bfloat16 autocast, profile {head['profile']}. "
        f"Seconds are modelled for an {device.name} of {device.flops[torch.bfloat16] / 1e12:.0f} TFLOP/s and "
        f"{device.bytes_per_second / 1e12:.1f} TB/s: products reach {device.product_share:.0%} of the peak, attention "
        f"{device.attention_share:.0%}, other kernels {device.memory_share:.0%} of the memory's speed, and no kernel takes "
        f"less than {1e6 * device.kernel_seconds:.0f} us. These shares are assumptions. Plain is distillation without "
        "quantization; unfused is with Phi on torch's own operators.",
        "",
        f"    {head['command']}",
        "",
        f"| {' | '.join(columns)} |",
        "|---" * len(columns) + "|",
        *(_line(row, name) for row in rows for name in VARIANTS),
    ]


def _line(row: Mapping[str, Any], name: str) -> str:
    own = row["traffic"][name]
    cells = [
        row["bits"],
        name,
        str(own["kernels"]),
        f"{own['product_flops'] / 1e15:.3f}",
        f"{own['attention_flops'] / 1e15:.3f}",
        f"{own['other_bytes'] / 1e9:.0f}",
        f"{row['seconds'][name]:.3f}",
        f"{row['ratios'][name]:.2f}",
    ]
    return f"| {' | '.join(cells)} |"


BENCHMARK = Benchmark(
    rows=step_traffic_rows,
    table=step_traffic_table,
    describe=lambda config: (
        f"step_traffic of {config.run.names.model} at {', '.join(width.label for width in config.widths)}"
    ),
    subject=name_of_model,
    group=("bits",),
)
