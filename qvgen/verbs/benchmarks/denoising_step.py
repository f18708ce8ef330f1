"""The benchmark ``denoising_step``: one call of a whole transformer, unquantized beside packed, by part.

Everything is bfloat16, or float32 where this processor has no bfloat16: what its user would run.

The transformer has its full width, random weights and ``blocks`` of its blocks; a call is measured by block and the blocks'
time counts for as many as the whole model has (every block does the same work), the rest once. The packed model is what
users load: prepared, folded, written and read back. With ``profile.attention=int8`` or ``int8_qk`` there is one more of each
width, whose attention is quantized too. Each round calls every variant once, one after the other; medians.

One more call runs under torch's profiler, for what linears, attention and norms take of it, and one with every tensor
followed, for the peak of activations. What of the linears is the quantization of inputs is measured apart: a packed layer of
32 outputs, called with the rows and columns of each call.

Time is the process's CPU time with one thread and wall time with more.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from qvgen.config.schema.train import TrainConfig
from qvgen.config.schema.verbs import BenchmarkConfig
from qvgen.deploy.checkpoint import load_timed, save_packed
from qvgen.deploy.manifest import WEIGHTS_FILE
from qvgen.deploy.merged_linear import MergedPackedLinear
from qvgen.deploy.on_the_fly import OPEN_ATTENTION
from qvgen.evaluation.environment import fast_bfloat16
from qvgen.initializers.prepare import PrepareConfig, prepare
from qvgen.initializers.rtn import RoundToNearest
from qvgen.layers.packed_linear import PackedLinear
from qvgen.layers.swap import fold, packed_layers
from qvgen.models.base import example_condition
from qvgen.quant.grid import Profile
from qvgen.training.design.meta_model import num_blocks
from qvgen.training.planning.live_bytes import LiveBytes
from qvgen.verbs.benchmarks.base import Benchmark, cpu_kernel
from qvgen.verbs.benchmarks.loading import PARTS, profile_of
from qvgen_kernels import LinearSpec, LinearTensors, packed_linear, prepack, resolve_kernel
from qvgen_kernels.weight import plane_shapes

_PARTS = {
    "linears": ("qvgen::packed_linear", "qvgen::fused_linear", "aten::linear"),
    "attention": ("aten::scaled_dot_product_attention", "qvgen::attention"),
    "norms": ("aten::layer_norm", "aten::rms_norm"),
}
"""Part -> the operators whose time it is; none of them calls another. The steps before a packed layer are its own time."""

_QUANTIZER_OUTPUTS = 32


def step_rows(config: BenchmarkConfig, *, done: Container[tuple[Any, ...]]) -> Iterator[dict[str, Any]]:
    """One row per number of threads and variant; ``done`` holds ``(threads,)`` of those that are left out."""
    run, attention = config.run, config.run.profile.attention
    if attention is not None and attention.is_searched:
        raise ValueError(f"{OPEN_ATTENTION}; a benchmark of random weights has none, write true or false")
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(run.seed)
        source = run.model.build({**run.model.transformer_config, "num_layers": config.blocks}).eval()
        dtype = torch.bfloat16 if fast_bfloat16() else torch.float32
        call = _Call(run, dtype)
        variants: dict[str, tuple[nn.Module, dict[str, Any]]] = {}
        for width in config.widths:
            profile = profile_of(run.profile, width)
            variants[width.label] = _packed(source, run, replace(profile, attention=None), dtype)
            if attention is not None:
                variants[f"{width.label}, {attention.kind} attention"] = _packed(source, run, profile, dtype)
        size = sum(dtype.itemsize * p.numel() for p in source.parameters())
        variants[_name(dtype)], before = (source.to(dtype), {"bytes": size}), torch.get_num_threads()
        try:
            for threads in (number for number in config.threads if (number,) not in done):
                torch.set_num_threads(threads)
                yield from _measure(variants, call, config=config, threads=threads)
        finally:
            torch.set_num_threads(before)


class _Call:
    """The inputs of one call: one sample."""

    def __init__(self, config: TrainConfig, dtype: torch.dtype) -> None:
        self.family = config.model
        self.noisy = torch.randn(1, *self.family.sample_shape, dtype=dtype)
        self.condition = example_condition(self.family, count=1, make=partial(torch.randn, dtype=dtype))

    def __call__(self, model: nn.Module) -> Tensor:
        timestep = torch.full((1,), 500.0)
        found: Tensor = self.family.predict(model, self.noisy, timestep, self.condition)
        return found


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _packed(
    source: nn.Module, config: TrainConfig, profile: Profile, dtype: torch.dtype
) -> tuple[nn.Module, dict[str, Any]]:
    """A packed model of the source's weights, read back from its directory, and what that took."""
    model = type(source).from_config(source.config)
    model.load_state_dict(source.state_dict())
    patterns = {"include": config.model.include, "exclude": config.model.exclude}
    prepare(model, PrepareConfig(profile=profile, initializer=RoundToNearest(), **patterns))
    fold(model, kernel=config.kernel)
    with tempfile.TemporaryDirectory() as folder:
        save_packed(model, folder)
        size = (Path(folder) / WEIGHTS_FILE).stat().st_size
        loaded, seconds = load_timed(folder, kernel=config.kernel)
    facts = {
        "bytes": size,
        "load_s": seconds.wall,
        "load_s_per_gb": seconds.wall / size * 1e9,
        "load_cpu_s": {part: getattr(seconds, part) for part in PARTS},
        "kernel": next(iter(packed_layers(loaded).values())).prepack_(),
    }
    return loaded.to(dtype), facts


def _measure(
    variants: Mapping[str, tuple[nn.Module, Mapping[str, Any]]], call: _Call, *, config: BenchmarkConfig, threads: int
) -> Iterator[dict[str, Any]]:
    clock = time.process_time if threads == 1 else time.perf_counter
    blocks = num_blocks(config.run.model)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in variants}
    for _ in range(config.timed_steps):
        for name, (model, _) in variants.items():
            found[name].append(_timed(model, call, clock=clock, scale=blocks / config.blocks))
    for name, (model, facts) in variants.items():
        seconds = {key: median(row[key] for row in found[name]) for key in found[name][0]}
        steps = [row["step_s"] for row in found[name]]
        seen = _watch(model, call)
        yield {
            "variant": name,
            "threads": threads,
            "tokens": max(rows for rows, _ in seen.calls),
            "blocks_run": config.blocks,
            "blocks": blocks,
            **seconds,
            "step_spread_s": max(steps) - min(steps),
            "shares": _shares(model, call),
            "dtype": _name(call.noisy.dtype),
            "quantize_s": _quantize_seconds(seen.calls, clock=clock, dtype=call.noisy.dtype),
            "activation_peak_bytes": seen.peak_bytes,
            **facts,
        }


def _timed(model: nn.Module, call: _Call, *, clock: Callable[[], float], scale: float) -> dict[str, float]:
    """Seconds of a call as it ran, of its blocks, and of the whole model."""
    inside = 0.0
    began: list[float] = []

    def leave(*_: Any) -> None:
        nonlocal inside
        inside += clock() - began.pop()

    blocks = [block for child in model.children() if isinstance(child, nn.ModuleList) for block in child]
    handles = [block.register_forward_pre_hook(lambda *_: began.append(clock())) for block in blocks]
    handles += [block.register_forward_hook(leave) for block in blocks]
    first = clock()
    call(model)
    total = clock() - first
    for handle in handles:
        handle.remove()
    return {"measured_s": total, "measured_blocks_s": inside, "step_s": total + inside * (scale - 1)}


@dataclass(frozen=True)
class _Seen:
    """What one call showed: the peak of activations, and rows and module of every call of a linear."""

    peak_bytes: int
    calls: list[tuple[int, nn.Module]]


def _watch(model: nn.Module, call: _Call) -> _Seen:
    calls: list[tuple[int, nn.Module]] = []

    def note(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        lead = module.parts[0] if isinstance(module, MergedPackedLinear) else module
        calls.append((args[0].shape[:-1].numel(), lead))

    linears = [m for m in model.modules() if isinstance(m, nn.Linear | PackedLinear | MergedPackedLinear)]
    hooks = [module.register_forward_pre_hook(note) for module in linears]
    with LiveBytes(known=[*model.parameters(), *model.buffers()]) as live:
        call(model)
    for hook in hooks:
        hook.remove()
    return _Seen(live.peak, calls)


def _shares(model: nn.Module, call: _Call) -> dict[str, float]:
    """What each part takes of a call's time, under the profiler."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        call(model)
    spent = {event.key: (event.cpu_time_total, event.self_cpu_time_total) for event in profiler.key_averages()}
    total = sum(own for _, own in spent.values())
    shares = {part: sum(spent.get(key, (0.0, 0.0))[0] for key in keys) / total for part, keys in _PARTS.items()}
    return {**shares, "rest": 1.0 - sum(shares.values())}


def _quantize_seconds(
    calls: Sequence[tuple[int, nn.Module]], *, clock: Callable[[], float], dtype: torch.dtype
) -> float:
    """Seconds of quantizing the inputs of all packed calls of one pass, each measured as a layer of 32 outputs."""
    known: dict[tuple[int, LinearSpec], float] = {}
    total = 0.0
    for rows, layer in calls:
        if isinstance(layer, PackedLinear):
            spec = replace(layer.spec, out_features=_QUANTIZER_OUTPUTS)
            if (rows, spec) not in known:
                x = torch.randn(rows, spec.in_features).to(dtype)
                known[rows, spec] = _small_layer_seconds(x, spec, layer.kernel, clock=clock)
            total += known[rows, spec]
    return total


def _small_layer_seconds(x: Tensor, spec: LinearSpec, kernel: str, *, clock: Callable[[], float]) -> float:
    name = resolve_kernel(kernel, spec).name
    planes = [torch.zeros(shape, dtype=torch.uint8) for shape in plane_shapes(spec)]
    zero = torch.zeros(spec.out_features, dtype=torch.uint8) if spec.weight_zero_point == "integer" else None
    weight = prepack(planes, scale=torch.ones(spec.out_features), zero_point=zero, spec=spec, kernel=name)
    times = []
    for _ in range(3):
        began = clock()
        packed_linear(x, weight=weight, tensors=LinearTensors(), spec=spec, kernel=name)
        times.append(clock() - began)
    return median(times)


def step_table(head: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The Markdown page."""
    full = rows[0]["dtype"]
    base = {row["threads"]: row["step_s"] for row in rows if row["variant"] == full}

    def line(row: Mapping[str, Any]) -> str:
        shares = row["shares"]
        cells = [
            row["variant"],
            str(row["threads"]),
            f"{row['step_s']:.1f} (spread {row['step_spread_s']:.1f})",
            f"{base[row['threads']] / row['step_s']:.2f}",
            *(f"{shares[part]:.0%}" for part in shares),
            "-" if row["variant"] == full else f"{row['quantize_s'] / row['measured_s']:.0%}",
            f"{row['activation_peak_bytes'] / 2**30:.2f}",
            f"{row['bytes'] / 2**20:.0f}",
            "-" if row["variant"] == full else f"{row['load_s']:.2f} ({row['load_s_per_gb']:.2f})",
            "-" if row["variant"] == full else ", ".join(f"{row['load_cpu_s'][part]:.2f}" for part in PARTS),
        ]
        return f"| {' | '.join(cells)} |"

    first = rows[0]
    columns = [
        "model", "threads", "step s", f"times {full}", *first["shares"], "quantizing", "activations GiB", "weights MiB",
        "load s (per GB)", f"CPU s of loading: {', '.join(PARTS)}",
    ]  # fmt: skip
    kernels = sorted({row["kernel"] for row in rows if "kernel" in row})
    return [
        f"# One denoising step of {head['model']}, random weights, {first['tokens']} tokens",
        "",
        f"{head['machine']['cpu']}, torch {head['versions']['torch']}, kernel {', '.join(kernels)}, "
        f"profile {head['profile']}, all but the packed products in {full}.",
        f"{first['blocks_run']} of {first['blocks']} blocks were run; seconds are of the whole model, with the blocks' time "
        "scaled; shares (quantizing is part of the linears), activations and weights are of what was run.",
        f"Medians of {head['timed_steps']} rounds. One thread: CPU time; more: wall time.",
        "",
        f"    {head['command']}",
        "",
        f"| {' | '.join(columns)} |",
        "|---" * len(columns) + "|",
        *(line(row) for row in rows),
    ]


def _describe(config: BenchmarkConfig) -> str:
    """What would be measured."""
    ends = ("",) if (own := config.run.profile.attention) is None else ("", f", {own.kind} attention")
    variants = ", ".join(["unquantized", *(f"{width.label}{end}" for width in config.widths for end in ends)])
    return f"denoising_step of {config.run.names.model}, {config.blocks} blocks: {variants}"


def _subject(config: BenchmarkConfig) -> str:
    """The model, the frames, since attention's share grows with them, and the processor's kernel."""
    kind = "" if (own := config.run.profile.attention) is None else f"-{own.kind.replace('_', '-')}-attention"
    return f"{config.run.names.model}-{config.run.model.num_frames}-frames{kind}-{cpu_kernel()}"


BENCHMARK = Benchmark(
    rows=step_rows, table=step_table, describe=_describe, subject=_subject, group=("threads",), several_rows=True
)
