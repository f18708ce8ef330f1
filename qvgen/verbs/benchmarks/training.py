"""The benchmark ``training``: optimizer steps of a model of full size with random weights, beside what the plan said of them.

Speed and memory of a step depend on shapes and not on what the weights are, so no weights and no clips are needed. Each step
is cut by device synchronizations into teacher, student's forward pass, backward pass (with the recomputation that
checkpointing asks for) and optimizer; a further step under torch's profiler says how the device's time is shared out.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from qvgen.config.leaves import load_leaf
from qvgen.config.schema.train import TrainConfig
from qvgen.config.schema.verbs import BenchmarkConfig
from qvgen.initializers.prepare import PrepareConfig
from qvgen.initializers.rtn import RoundToNearest
from qvgen.layers.swap import quantized_layers, select_linears, swap_fake_quant_
from qvgen.models.base import example_condition
from qvgen.models.few_step import own_timesteps
from qvgen.training.blocks.checkpointing import block_checkpoint
from qvgen.training.design.layer_setup import set_up_phi_
from qvgen.training.design.meta_model import narrow_
from qvgen.training.module import VideoTraining
from qvgen.training.planning.memory import teacher_dtype
from qvgen.training.planning.training_plan import plan_training
from qvgen.verbs._parts import step_batch, student_design, training_run
from qvgen.verbs.benchmarks.base import Benchmark

PLANNED_STEPS = 100
"""Of the run that is pretended: enough for all phases of Phi, of which the first one is measured."""

_KERNELS = {
    "attention": ("flash", "fmha", "attention", "sdpa", "softmax"),
    "matrix products": ("gemm", "cutlass", "cublas", "addmm", "::mm", "::bmm", "nvjet", "linear"),
}
"""Part -> words in the names of its kernels; everything else is elementwise work: quantizers, norms, optimizer."""


def training_rows(config: BenchmarkConfig, *, done: Container[tuple[Any, ...]]) -> Iterator[dict[str, Any]]:
    """One row per bit-width; ``done`` holds ``(bits,)`` of those that are left out."""
    device = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
    for width in (width for width in config.widths if (width.label,) not in done):
        grids = {"weight": width.weight, "activation": width.activation}
        profile_of_width = replace(
            config.run.profile,
            **{side: replace(getattr(config.run.profile, side), bits=bits) for side, bits in grids.items()},
        )
        run = replace(
            config.run,
            bits=width,
            profile=profile_of_width,
            method=load_leaf("method", "qvgen"),
            steps=PLANNED_STEPS,
        )
        plan = plan_training(
            training_run(run), device_memory_gib=run.device_memory_gib, checkpoints_kept=run.checkpoint.keep
        )
        measured = _Measured(run, device=device)
        row = measured.steps(config.timed_steps)
        yield {
            "bits": width.label,
            "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
            "clip": list(run.model.sample_shape),
            "micro_batch": step_batch(run).micro_batch_size,
            "gradient_checkpointing": run.strategy.gradient_checkpointing,
            **row,
            "tflops_per_s": plan.count.flops / row["micro_batch_s"] / 1e12,
            "planned_bytes": plan.memory_bytes,
        }


def quantize_untrained_(student: nn.Module, config: TrainConfig) -> None:
    """Prepare a student of random weights for a step of the configured method, where it lies: ranges by round-to-nearest."""
    chosen = select_linears(student, include=config.model.include, exclude=config.model.exclude)
    swap_fake_quant_(
        student,
        names=chosen.quantized,
        profile=config.profile,
        num_noise_bands=PrepareConfig.num_noise_bands,
        phi_rank=student_design(config).phi_rank,
        phi_keep=student_design(config).phi_keep,
        timesteps=own_timesteps(config.model),
    )
    for layer in quantized_layers(student).values():
        RoundToNearest().initialize_(layer, statistics=None)
    set_up_phi_(student, config.phi)
    config.method.prepare_(student)
    config.method.start_(student, seed=config.seed)


class _Measured:
    """A student, a teacher and an optimizer on a device, and the clocks around their calls."""

    def __init__(self, config: TrainConfig, *, device: torch.device) -> None:
        self.config, self.device = config, device
        family = config.model
        with torch.device(device):
            teacher = narrow_(family.build(family.transformer_config), dtype=teacher_dtype(family))
            student = family.build(family.transformer_config).float()
            quantize_untrained_(student, config)
        count = step_batch(config).micro_batch_size
        self.batch = {
            "video": torch.randn(count, *family.sample_shape, device=device),
            "caption": [""] * count,
            "sample_id": torch.arange(count),
        }
        condition = example_condition(family, count=count, make=partial(torch.randn, device=device))
        self.module = VideoTraining(
            training_run(config), student=student, teacher=teacher, encode=lambda _: condition
        ).to(device)
        self.module.setup("fit")
        if config.strategy.gradient_checkpointing:
            student.enable_gradient_checkpointing(block_checkpoint(keep_attention=config.strategy.keep_attention))
        self.optimizer = self.module.configure_optimizers()["optimizer"]
        if (schedule := student_design(config).schedule(config.steps)) is not None:
            schedule.apply_(student, None, step=0)
        self.clock = {"teacher": 0.0}
        began: list[float] = []
        teacher.register_forward_pre_hook(lambda *_: began.append(self._now()))
        teacher.register_forward_hook(lambda *_: self._add("teacher", began.pop()))
        student.train()

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def _add(self, part: str, began: float) -> None:
        self.clock[part] = self.clock.get(part, 0.0) + self._now() - began

    def _step(self) -> dict[str, float]:
        """Seconds of one micro-batch and one optimizer step, by part."""
        self.clock = {}
        began = self._now()
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.device.type == "cuda"):
            loss = self.module.loss(self.module.draw(self.batch, step=0))
        self._add("forward", began)
        middle = self._now()
        loss.backward()
        self._add("backward", middle)
        self.clock["micro_batch"] = self._now() - began
        last = self._now()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)
        self._add("optimizer", last)
        self.clock["student_forward"] = self.clock.pop("forward") - self.clock["teacher"]
        return dict(self.clock)

    def steps(self, count: int) -> dict[str, Any]:
        """Medians over ``count`` steps after one that warms up, peak memory, and shares of the device's time."""
        self._step()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        found = [self._step() for _ in range(count)]
        peak = torch.cuda.max_memory_allocated() if self.device.type == "cuda" else None
        seconds = {f"{part}_s": median(row[part] for row in found) for part in found[0]}
        spread = {
            f"{part}_spread_s": max(row[part] for row in found) - min(row[part] for row in found) for part in found[0]
        }
        return {**seconds, **spread, "peak_bytes": peak, "shares": self._shares()}

    def _shares(self) -> dict[str, float]:
        on_gpu = self.device.type == "cuda"
        with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
            self._step()
        seconds = dict.fromkeys([*_KERNELS, "elementwise and the rest"], 0.0)
        for event in profiler.key_averages():
            spent = event.self_device_time_total if on_gpu else event.self_cpu_time_total
            seconds[_part(event.key)] += spent
        total = sum(seconds.values()) or 1.0
        return {part: value / total for part, value in seconds.items()}


def _part(kernel: str) -> str:
    name = kernel.lower()
    for part, words in _KERNELS.items():
        if any(word in name for word in words):
            return part
    return "elementwise and the rest"


def training_table(head: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The Markdown page."""
    columns: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "bits": lambda row: str(row["bits"]),
        "micro-batch s": lambda row: f"{row['micro_batch_s']:.3f} (spread {row['micro_batch_spread_s']:.3f})",
        "teacher": lambda row: f"{row['teacher_s'] / row['micro_batch_s']:.0%}",
        "student forward": lambda row: f"{row['student_forward_s'] / row['micro_batch_s']:.0%}",
        "backward": lambda row: f"{row['backward_s'] / row['micro_batch_s']:.0%}",
        "optimizer s": lambda row: f"{row['optimizer_s']:.3f}",
        "TFLOP/s": lambda row: f"{row['tflops_per_s']:.3g}",
        "peak GiB": lambda row: "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**30:.1f}",
        "planned GiB": lambda row: f"{row['planned_bytes'] / 2**30:.3g}",
        **{
            part: lambda row, part=part: f"{row['shares'][part]:.0%}"
            for part in [*_KERNELS, "elementwise and the rest"]
        },
    }
    first = rows[0]
    return [
        f"# A training step of {head['model']}, random weights",
        "",
        f"{first['device']}, samples of {' x '.join(map(str, first['clip']))}, {first['micro_batch']} at once, gradient "
        f"checkpointing {'on' if first['gradient_checkpointing'] else 'off'}, profile {head['profile']}, Phi of full rank, "
        f"torch {head['versions']['torch']}. Medians. The last three "
        "columns are shares of the device's time under the profiler.",
        "",
        f"    {head['command']}",
        "",
        f"| {' | '.join(columns)} |",
        "|---" * len(columns) + "|",
        *(f"| {' | '.join(show(row) for show in columns.values())} |" for row in rows),
    ]


BENCHMARK = Benchmark(rows=training_rows, table=training_table, group=("bits",))
