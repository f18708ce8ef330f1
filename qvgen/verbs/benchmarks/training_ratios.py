"""The benchmark ``training_ratios``: what fake quantization and Phi add to a forward and backward pass, as ratios.

A subject is one of

    MxK-N         a Linear of K columns and N outputs on M rows
    block@FxHxW   the first block of the model, with random weights, on latents of F x H x W
    step          a step of the whole model, with teacher and optimizer (plain: distillation without quantization)

In every round each variant is run once, in turn: plain, fake-quantized, and with Phi. A ratio is the median of the rounds'
ratios to the plain one, so that what slows the machine down for a while falls on all. Times are processor time of the calling
thread where one thread runs, and wall time otherwise. Bytes are those of the tensors that the forward pass saves for the
backward pass, each storage once.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from qvgen.config.bits import Bits
from qvgen.config.leaves import load_leaf
from qvgen.config.schema.train import TrainConfig
from qvgen.config.schema.verbs import BenchmarkConfig
from qvgen.initializers.prepare import PrepareConfig, prepare
from qvgen.initializers.rtn import RoundToNearest
from qvgen.layers.fake_quant_linear import FakeQuantLinear
from qvgen.layers.noise_band import NoiseBand
from qvgen.models.base import example_condition
from qvgen.training.module import VideoTraining
from qvgen.training.planning.live_bytes import tensor_bytes
from qvgen.verbs._parts import step_batch, training_run
from qvgen.verbs.benchmarks.base import (
    Benchmark,
    Shape,
    cpu_kernel,
    of_rounds,
    shapes_of,
    shown_rounds,
    table_lines,
    timed_cells,
)
from qvgen.verbs.benchmarks.loading import profile_of

VARIANTS = ("plain", "quantized", "with Phi")
_BLOCK = re.compile(r"block@([1-9]\d*)x([1-9]\d*)x([1-9]\d*)")


@dataclass(frozen=True)
class Candidate:
    """One variant of a subject.

    Attributes:
        forward: Runs the forward pass; gives what is differentiated.
        finish: Runs what follows the backward pass.
        module: Its parameters get gradients.
    """

    forward: Callable[[], Tensor]
    module: nn.Module
    finish: Callable[[], object] = lambda: None


def training_ratio_rows(config: BenchmarkConfig, *, done: Container[tuple[Any, ...]]) -> Iterator[dict[str, Any]]:
    """One row per subject, width and number of threads.

    Raises:
        ValueError: A subject of another form.
    """
    for text in shapes_of(config):
        _check_subject(text)
    for text, width, threads in timed_cells(config, [text for text in shapes_of(config) if (text,) not in done]):
        measured = _measure(_candidates(text, width, config), rounds=config.timed_steps, threads=threads)
        yield {"subject": text, "bits": width.label, "threads": threads, **measured}


def _check_subject(text: str) -> None:
    if text == "step" or _BLOCK.fullmatch(text):
        return
    try:
        shape = Shape.parse(text)
    except ValueError:
        shape = None
    if shape is None or len(shape.widths) != 2:
        raise ValueError(f"shapes holds {text!r}; write MxK-N, block@FxHxW or step, as 4096x1920-1920 or block@3x60x86")


def _candidates(text: str, width: Bits, config: BenchmarkConfig) -> dict[str, Candidate]:
    profile = profile_of(config.run.profile, width)
    run = replace(config.run, bits=width, profile=profile, method=load_leaf("method", "qvgen"), steps=100)
    if text == "step":
        return {name: _step(run, name) for name in VARIANTS}
    if (found := _BLOCK.fullmatch(text)) is not None:
        sizes = tuple(map(int, found.groups()))
        return {name: _block(run, name, sizes=sizes) for name in VARIANTS}
    shape = Shape.parse(text)
    return {name: _linear(run, name, shape=shape) for name in VARIANTS}


def _quantize_(model: nn.Module, run: TrainConfig, variant: str) -> None:
    """Bring a plain transformer to a variant."""
    if variant == "plain":
        return
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    profile = run.profile.fitted([linear.in_features for linear in linears])
    options: dict[str, Any] = {"include": run.model.include, "exclude": run.model.exclude, "seed": run.seed}
    rank = run.phi.rank if variant == "with Phi" else 0
    prepare(model, PrepareConfig(profile=profile, initializer=RoundToNearest(), phi_rank=rank, **options))


def _set_bands(model: nn.Module, samples: int) -> None:
    for layer in (module for module in model.modules() if isinstance(module, FakeQuantLinear)):
        layer.noise_band.set_timestep(torch.zeros(samples))


def _linear(run: TrainConfig, variant: str, *, shape: Shape) -> Candidate:
    columns, outputs = shape.widths
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.seed)
        linear: nn.Module = nn.Linear(columns, outputs)
        x = torch.randn(1, shape.rows, columns).requires_grad_()
    if variant != "plain":
        assert isinstance(linear, nn.Linear)
        profile = run.profile.fitted([columns])
        rank = min(run.phi.rank, columns, outputs) if variant == "with Phi" else 0
        layer = FakeQuantLinear(linear, profile=profile, noise_band=NoiseBand(1), phi_rank=rank)
        RoundToNearest().initialize_(layer, statistics=None)
        layer.start_phi_(generator=torch.Generator().manual_seed(run.seed))
        _set_bands(layer, 1)
        linear = layer
    return Candidate(forward=lambda: linear(x).square().mean(), module=linear)


def _block(run: TrainConfig, variant: str, *, sizes: tuple[int, ...]) -> Candidate:
    """The first block with the inputs that it gets when the model is called."""
    family = run.model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.seed)
        model = family.build({**family.transformer_config, "num_layers": 1})
        noisy = torch.randn(1, family.sample_shape[0], *sizes)
        condition = example_condition(family, count=1, make=torch.randn)
    (block,) = next(child for child in model.children() if isinstance(child, nn.ModuleList))
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    handle = block.register_forward_pre_hook(lambda _, args, kwargs: seen.append((args, kwargs)), with_kwargs=True)
    try:
        with torch.no_grad():
            family.predict(model, noisy, torch.full((1,), 500.0), condition)
    except RuntimeError as error:
        text, own = "x".join(map(str, sizes)), "x".join(map(str, family.sample_shape[1:]))
        raise ValueError(
            f"shapes holds block@{text}, which model={run.names.model} does not take ({error}); its own is {own}"
        ) from error
    handle.remove()
    _quantize_(model, run, variant)
    _set_bands(model, 1)
    args, kwargs = seen[0]
    args = tuple(value.requires_grad_() if _is_input(value) else value for value in args)

    def forward() -> Tensor:
        output = block(*args, **kwargs)
        parts = output if isinstance(output, tuple) else (output,)
        return torch.stack([part.square().mean() for part in parts]).sum()

    return Candidate(forward=forward, module=block.train())


def _is_input(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _step(run: TrainConfig, variant: str) -> Candidate:
    """A step of training by a teacher, on random weights and samples."""
    family = run.model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.seed)
        teacher, student = (family.build(family.transformer_config).float() for _ in range(2))
        count = step_batch(run).micro_batch_size
        video = torch.randn(count, *family.sample_shape)
        condition = example_condition(family, count=count, make=torch.randn)
    _quantize_(student, run, variant)
    module = VideoTraining(training_run(run), student=student, teacher=teacher, encode=lambda _: condition)
    module.setup("fit")
    optimizer = module.configure_optimizers()["optimizer"]
    batch = {"video": video, "caption": [""] * count, "sample_id": torch.arange(count)}
    student.train()
    return Candidate(
        forward=lambda: module.loss(module.draw(batch, step=0)), module=student, finish=lambda: optimizer.step()
    )


def _measure(candidates: Mapping[str, Candidate], *, rounds: int, threads: int) -> dict[str, Any]:
    clock = time.thread_time if threads == 1 else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for number in range(rounds + 1):
        for name, candidate in candidates.items():
            candidate.module.zero_grad(set_to_none=True)
            began = clock()
            candidate.forward().backward()
            candidate.finish()
            if number:  # the first round warms up
                seconds[name].append(clock() - began)
    plain = seconds["plain"]
    ratios = {name: [a / b for a, b in zip(own, plain, strict=True)] for name, own in seconds.items()}
    return {
        "seconds": seconds,
        "saved_bytes": {name: _saved_bytes(candidate) for name, candidate in candidates.items()},
        "ratios": {name: of_rounds(own) for name, own in ratios.items()},
    }


def _saved_bytes(candidate: Candidate) -> int:
    """Bytes that the forward pass saves for the backward pass, beside parameters."""
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        candidate.forward()
    own = {parameter.untyped_storage().data_ptr() for parameter in candidate.module.parameters()}
    return tensor_bytes([tensor for tensor in saved if tensor.untyped_storage().data_ptr() not in own])


def training_ratio_table(head: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The Markdown page."""
    columns = [
        "subject",
        "bits",
        "threads",
        "plain ms",
        "quantized",
        "with Phi",
        "saved MB: plain",
        "quantized",
        "with Phi",
    ]
    return [
        f"# What quantization adds to a step of {head['model']}",
        "",
        f"{head['machine']['cpu']}, torch {head['versions']['torch']}, float32, profile {head['profile']}, random weights. "
        "Forward + backward pass of a Linear (MxK-N), of the model's first block (block@FxHxW of latents), or a whole "
        f"step with teacher and optimizer. Medians of {head['timed_steps']} interleaved rounds in one process; the ratios "
        "are to the plain one: median of the rounds' ratios (lowest to highest). Plain is nn.Linear, and for a step "
        "distillation without quantization.",
        "",
        f"    {head['command']}",
        "",
        *table_lines(columns, map(_cells, rows)),
    ]


def _cells(row: Mapping[str, Any]) -> list[str]:
    ratios = [shown_rounds(row["ratios"][name]) for name in VARIANTS[1:]]
    saved = [f"{row['saved_bytes'][name] / 1e6:.1f}" for name in VARIANTS]
    plain = f"{1000 * median(row['seconds']['plain']):.1f}"
    return [row["subject"], row["bits"], str(row["threads"]), plain, *ratios, *saved]


def _describe(config: BenchmarkConfig) -> str:
    """What would be measured."""
    for text in shapes_of(config):
        _check_subject(text)
    widths = ", ".join(width.label for width in config.widths)
    return f"training_ratios: {', '.join(shapes_of(config))} of {config.run.names.model} at {widths}"


BENCHMARK = Benchmark(
    rows=training_ratio_rows,
    table=training_ratio_table,
    describe=_describe,
    subject=lambda config: f"{config.run.names.model}-{cpu_kernel()}",
    group=("subject",),
    shapes=("1024x1920-1920", "4096x1920-1920", "4096x1920-7680", "step"),
    several_rows=True,
)
