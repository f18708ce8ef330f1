"""A training step in each of its variants, on random weights: what it takes, beside what was planned and predicted.

plain        distillation without quantization
quantized    fake-quantized Linears
integers     the same, the forward products of their codes by 8-bit integers (strategy.int8_products=always)
with Phi     and helper modules
unfused      with Phi, on torch's own operators
compiled     with Phi, blocks under torch.compile
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch

from qvgen.config.build import build
from qvgen.config.compose import compose_plain
from qvgen.config.leaves import load_leaf
from qvgen.config.schema.train import TrainConfig
from qvgen.layers.fused_product import unfused
from qvgen.layers.integer_product import set_int8_products
from qvgen.training.blocks.checkpointing import block_checkpoint
from qvgen.training.blocks.compiled import compile_blocks_, release_blocks_
from qvgen.training.design.meta_model import narrow_
from qvgen.training.module import VideoTraining
from qvgen.training.planning.memory import teacher_dtype
from qvgen.training.planning.training_plan import plan_training
from qvgen.verbs._parts import training_run
from qvgen.verbs.benchmarks.step_traffic import count_blocks_traffic, count_traffic
from qvgen.verbs.benchmarks.training import quantize_untrained_

METHODS = {
    "plain": "kd", "quantized": "kd", "integers": "kd", "with Phi": "qvgen", "unfused": "qvgen", "compiled": "qvgen",
}  # fmt: skip
"""Variant -> its method."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model whose step is measured.

    Attributes:
        model: Name of conf/model.
        blocks: Transformer blocks; None: all of them.
        words: Further words of a train command.
        variants: What is measured, in this order.
    """

    model: str
    blocks: int | None = None
    words: tuple[str, ...] = ()
    variants: tuple[str, ...] = tuple(METHODS)

    @property
    def label(self) -> str:
        """Model and blocks in words."""
        return self.model if self.blocks is None else f"{self.model}, {self.blocks} of its blocks"


def configured(case: Case, variant: str) -> TrainConfig:
    """The run of a variant: one sample at a time; Phi starts at random, which costs no decomposition and steps the same."""
    words = ["data=moving_digits"] if case.model.startswith("tiny") else []
    words += [
        f"model={case.model}",
        "bits=4",
        "batch_size=1",
        "steps=100",
        "logger=csv",
        "phi.start=random",
        "devices=1",
    ]
    config: TrainConfig = build("train", compose_plain("train", [*words, *case.words]))
    return replace(config, method=load_leaf("method", METHODS[variant]))


class Step:
    """Models and optimizer of a variant on a device; a call is one micro-batch and one optimizer step.

    Args:
        case: The model.
        variant: Of :data:`METHODS`.
        device: Where.
    """

    def __init__(self, case: Case, variant: str, device: torch.device) -> None:
        self.config = config = configured(case, variant)
        self.variant, self.device, family = variant, device, config.model
        changes = {} if case.blocks is None else {"num_layers": case.blocks}
        torch.manual_seed(0)
        with torch.device(device):
            teacher = narrow_(
                family.build({**family.transformer_config, **changes}), dtype=teacher_dtype(family)
            ).requires_grad_(False)
            self.student = family.build({**family.transformer_config, **changes}).float()
            if variant != "plain":
                quantize_untrained_(self.student, config)
        tokens, channels = family.condition_shape
        self.batch = {
            "video": torch.randn(1, *family.sample_shape, device=device),
            "caption": [""],
            "sample_id": torch.arange(1),
        }
        condition = {"encoder_hidden_states": torch.randn(1, tokens, channels, device=device)}
        run = training_run(config)
        self.module = VideoTraining(run, student=self.student, teacher=teacher, encode=lambda _: condition).to(device)
        self.module.setup("fit")
        if config.strategy.gradient_checkpointing:
            self.student.enable_gradient_checkpointing(block_checkpoint(keep_attention=False))
        set_int8_products("always" if variant == "integers" else "never")
        if variant == "compiled":
            compile_blocks_(self.student)
        self.optimizer = self.module.configure_optimizers()["optimizer"]
        self.student.train()

    def _operators(self) -> AbstractContextManager[Any]:
        return unfused() if self.variant == "unfused" else nullcontext()

    def now(self) -> float:
        """Seconds of a clock, when the device has done all that it was asked for."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def __call__(self) -> tuple[float, float]:
        """Seconds of the micro-batch and of the optimizer's step."""
        began = self.now()
        with self._operators(), torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            loss = self.module.loss(self.module.draw(self.batch, step=0))
        with self._operators():
            loss.backward()
        middle = self.now()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)
        return middle - began, self.now() - middle

    def close(self) -> None:
        """Give back what a compiled step holds, and products as they were."""
        set_int8_products("auto")
        if self.variant == "compiled":
            release_blocks_(self.student)


def measure(case: Case, variant: str, device: torch.device, *, rounds: int) -> dict[str, Any]:
    """Median and extremes of some steps, and the device's peak memory, the first step (which warms up) left out."""
    step = Step(case, variant, device)
    try:
        began = step.now()
        step()
        first = step.now() - began
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        found = [step() for _ in range(rounds)]
    finally:
        step.close()
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
    batches = [seconds for seconds, _ in found]
    return {
        "first_s": first,
        "micro_batch_s": [min(batches), median(batches), max(batches)],
        "optimizer_s": median(seconds for _, seconds in found),
        "peak_bytes": peak,
    }


def rows(cases: Sequence[Case], device: torch.device, *, rounds: int) -> Iterator[dict[str, Any]]:
    """One row per case and variant, as soon as it is there; a variant that fails becomes a row with its error."""
    for case in cases:
        for variant in case.variants:
            row: dict[str, Any] = {"model": case.label, "variant": variant}
            try:
                row |= measure(case, variant, device, rounds=rounds)
                row |= expected(case, variant)
            except Exception as error:  # whatever a variant raises is a finding, and the others go on
                row["error"] = f"{type(error).__name__}: {' '.join(str(error).split())}"[:600]
            yield row
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()


def expected(case: Case, variant: str) -> dict[str, Any]:
    """What the plan says of memory and the model of a GPU of time, where they know the variant."""
    run, found = configured(case, variant), {}
    if variant not in ("compiled", "integers"):
        blocks = case.blocks
        counted = count_traffic(run, variant) if blocks is None else count_blocks_traffic(run, variant, blocks=blocks)
        found["predicted_s"] = counted.seconds
    if variant in ("quantized", "with Phi") and case.blocks is None:
        found["planned_bytes"] = plan_training(training_run(run), device_memory_gib=1024).memory_bytes
    return found
