"""The benchmark ``svdq_accumulation``: what sums in half precision change, as SVDQuant's W4A4 kernels have them.

    exact    y += (q_x q_w) s_x s_w in float32 for every group of 64 columns     half    every step of it rounded

(:mod:`qvgen.deploy.exporters.svdq_layer`). Layers of random weights with the two widths of CogVideoX-2b and Wan 2.1 that are
farthest apart, on normal and on heavy-tailed inputs (Student's t with 3 degrees of freedom, one channel ten times as loud),
and every layer of the chosen model, quantized without training, on its own inputs; and that model's videos. Beside the
difference stands what quantization costs: the distance of the exact product from the full-precision one.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from qvgen.config.bits import Bits
from qvgen.config.leaves import load_leaf, load_profile
from qvgen.config.schema.train import TrainConfig
from qvgen.config.schema.verbs import BenchmarkConfig
from qvgen.deploy.exporters.svdq_layer import SvdqForm, svdq_half_output, svdq_output
from qvgen.deploy.exporters.svdq_tiles import GROUP
from qvgen.evaluation.distance import psnr_db
from qvgen.initializers.prepare import PrepareConfig, prepare
from qvgen.layers.fake_quant_linear import FakeQuantLinear
from qvgen.layers.noise_band import NoiseBand
from qvgen.layers.packed_linear import PackedLinear
from qvgen.layers.swap import fold, packed_layers, select_linears
from qvgen.quant.grid import Profile
from qvgen.verbs.benchmarks.base import Benchmark

WIDTHS = (1920, 8960)
"""Columns of the random layers: CogVideoX-2b's tokens, and the inside of Wan 2.1's feed-forward."""
ROWS, TOKENS = 256, 256
INPUTS = ("normal", "heavy-tailed")
DTYPES = ("bfloat16", "float16")


def accumulation_rows(config: BenchmarkConfig, *, done: Container[tuple[Any, ...]]) -> Iterator[dict[str, Any]]:
    """One row per layer width, kind of inputs and precision, then two for the model; ``done`` holds those left out."""
    generator_seed = config.seeds[0]
    for columns in WIDTHS:
        for inputs in INPUTS:
            for dtype in DTYPES:
                group = {"source": f"K = {columns}", "inputs": inputs, "dtype": dtype}
                if tuple(group.values()) not in done:
                    yield {**group, **random_row(columns, inputs, dtype, seed=generator_seed)}
    for dtype in DTYPES:
        group = {"source": config.run.names.model, "inputs": "its own", "dtype": dtype}
        if tuple(group.values()) not in done:
            yield {**group, **model_row(config.run, dtype, seed=generator_seed, videos=config.videos)}


def svdq_profile(dtype: str) -> Profile:
    """The profile with scales of a precision."""
    profile = load_profile("svdq_g64", Bits(weight=4, activation=4))
    scales: dict[str, Any] = {"scale_dtype": dtype}
    return replace(profile, weight=replace(profile.weight, **scales), activation=replace(profile.activation, **scales))


def random_inputs(columns: int, inputs: str, *, seed: int) -> Tensor:
    """float32 [TOKENS, K]."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(TOKENS, columns, generator=generator)
    if inputs == "heavy-tailed":  # t = z / sqrt(chi2 / 3)
        chi2 = torch.randn(3, TOKENS, columns, generator=generator).square().sum(0)
        x = x / (chi2 / 3).sqrt()
        x[:, 0] *= 10
    return x


@torch.no_grad()
def random_row(columns: int, inputs: str, dtype: str, *, seed: int) -> dict[str, Any]:
    """Measure a layer of random weights [ROWS, K]."""
    linear = nn.Linear(columns, ROWS, bias=False)
    linear.weight.normal_(0, columns**-0.5, generator=torch.Generator().manual_seed(seed + 1))
    full = linear.weight.clone()
    layer = FakeQuantLinear(linear, profile=svdq_profile(dtype), noise_band=NoiseBand(1))
    load_leaf("init", "mse").initialize_(layer, statistics=None)
    x = random_inputs(columns, inputs, seed=seed)
    return compare_sums(PackedLinear.from_fake_quant(layer, kernel="reference"), x, x @ full.t(), dtype=dtype)


def compare_sums(layer: PackedLinear, x: Tensor, wanted: Tensor, *, dtype: str) -> dict[str, Any]:
    """Distances of the product in half precision from the exact one, and of the exact one from full precision."""
    tensors = SvdqForm(dtype=dtype, rank=0).tensors(layer)
    exact, half = (output(tensors, x)[:, : layer.out_features] for output in (svdq_output, svdq_half_output))
    return {
        "groups": layer.in_features // GROUP,
        "sums_error": float((half - exact).norm() / exact.norm()),
        "sums_max_abs": float((half - exact).abs().max() / exact.abs().max()),
        "quantization_error": float((exact - wanted).norm() / wanted.norm()),
    }


class SvdqLinear(nn.Module):
    """A layer with the kernels' arithmetic that remembers the inputs of its first call."""

    def __init__(self, layer: PackedLinear, *, dtype: str, full: nn.Linear) -> None:
        super().__init__()
        self.layer, self.full, self.dtype = layer, full, dtype
        self.stored = SvdqForm(dtype=dtype, rank=0).tensors(layer)
        self.half = False
        self.seen: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to x [..., K]."""
        rows = x.float().flatten(0, -2)
        if self.seen is None:
            self.seen = rows[:TOKENS].clone()
        output = svdq_half_output if self.half else svdq_output
        y = output(self.stored, rows)[:, : self.layer.out_features]
        return y.unflatten(0, x.shape[:-1]).to(x.dtype)

    @torch.no_grad()
    def compare(self) -> dict[str, Any]:
        """See :func:`compare_sums`, on the inputs that were seen."""
        assert self.seen is not None
        wanted = nn.functional.linear(self.seen, self.full.weight, self.full.bias)
        return compare_sums(self.layer, self.seen, wanted, dtype=self.dtype)


def model_row(run: TrainConfig, dtype: str, *, seed: int, videos: int) -> dict[str, Any]:
    """Measure every layer of a model on its own inputs, the model in the calls of its sampler, and its videos."""
    family = run.model
    captions = [family.prompts[index % len(family.prompts)] for index in range(videos)]
    seeds = [seed + index for index in range(videos)]
    sampling = {"num_steps": family.num_inference_steps, "guidance_scale": family.guidance_scale}
    teacher = family.load_teacher(dtype=torch.float32)
    full = family.generate(teacher, captions, seeds, **sampling)
    model, layers = _svdq_model(run, dtype)
    calls: list[tuple[Any, Any, Tensor]] = []
    hook = model.register_forward_hook(
        lambda _, words, named, found: calls.append((words, named, found[0])), with_kwargs=True
    )
    exact = family.generate(model, captions, seeds, **sampling)
    hook.remove()
    rows = [layer.compare() for layer in layers]
    for layer in layers:
        layer.half = True
    outputs = torch.stack([found for _, _, found in calls])
    with torch.no_grad():
        half_outputs, full_outputs = (
            torch.stack([called(*words, **named)[0] for words, named, _ in calls]) for called in (model, teacher)
        )
    half = family.generate(model, captions, seeds, **sampling)
    return {
        **{key: max(row[key] for row in rows) for key in rows[0]},
        "model_sums_error": float((half_outputs - outputs).norm() / outputs.norm()),
        "model_quantization_error": float((outputs - full_outputs).norm() / full_outputs.norm()),
        "layers": len(rows),
        "videos": videos,
        "psnr_db": psnr_db(half, exact, max_value=255),
        "quantized_to_full_db": psnr_db(exact, full, max_value=255),
    }


@torch.no_grad()
def _svdq_model(run: TrainConfig, dtype: str) -> tuple[nn.Module, list[SvdqLinear]]:
    """A model whose Linears have the kernels' arithmetic, and those."""
    family = run.model
    model = family.load_teacher(dtype=torch.float32)
    names = select_linears(model, include=family.include, exclude=family.exclude).quantized
    originals = {name: model.get_submodule(name) for name in names}
    init, grids = load_leaf("init", "mse"), svdq_profile(dtype)
    prepare(model, PrepareConfig(profile=grids, initializer=init, include=family.include, exclude=family.exclude))
    fold(model, kernel="reference")
    layers = []
    for name, layer in packed_layers(model).items():
        full = originals[name]
        assert isinstance(full, nn.Linear)
        layers.append(SvdqLinear(layer, dtype=dtype, full=full))
        model.set_submodule(name, layers[-1])
    return model, layers


def accumulation_table(head: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The Markdown page."""
    model = next((row for row in rows if "layers" in row), None)
    of_model = [] if model is None else [
        f"The rows of {model['source']} hold the largest values of its {model['layers']} layers on their own inputs; the",
        "same two errors of the whole model's outputs, in all calls of its sampler and each on the same inputs; and PSNRs of",
        f"{model['videos']} videos in dB: to those with exact sums, and of those with exact sums to full precision.",
    ]  # fmt: skip
    columns = [
        "layer", "inputs", "precision", "groups", "difference of the sums", "largest, of the largest output",
        "error of quantization itself", "model: difference", "model: quantization", "videos", "quantized videos",
    ]  # fmt: skip
    return [
        "# Sums in half precision in SVDQuant's W4A4 kernels",
        "",
        f"{head['machine']['cpu']}, torch {head['versions']['torch']}; profile svdq_g64, W4A4, no training with it.",
        *_INTRODUCTION,
        *of_model,
        "",
        f"    {head['command']}",
        "",
        f"| {' | '.join(columns)} |",
        "|" + "---|" * len(columns),
        *(_line(row) for row in rows),
        "",
        *_NOTES,
    ]


def _line(row: Mapping[str, Any]) -> str:
    of_model = [row.get(key) for key in ("model_sums_error", "model_quantization_error")]
    videos = [row.get(key) for key in ("psnr_db", "quantized_to_full_db")]
    cells = [
        row["source"], row["inputs"], row["dtype"], str(row["groups"]), f"**{row['sums_error']:.2%}**",
        f"{row['sums_max_abs']:.2%}", f"{row['quantization_error']:.1%}",
        *("-" if error is None else f"{error:.1%}" for error in of_model),
        *("-" if video is None else f"{float(video):.1f}" for video in videos),
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


_INTRODUCTION = (
    "The kernels keep the sum over groups of 64 columns in the precision of the scales. This is their arithmetic in plain",
    f"torch against the same product with sums in float32. Random layers are {ROWS} x K with {TOKENS} tokens and normal",
    "weights; heavy tails are Student's t with 3 degrees of freedom and one channel ten times as loud.",
)
_NOTES = (
    "Differences are |y_half - y| / |y|, the error of quantization is |y - y_full| / |y_full|. A profile with float16",
    "scales (`profile.weight.scale_dtype=float16 profile.activation.scale_dtype=float16`, and `export.dtype=float16`) has",
    "an eighth of bfloat16's difference, and overflows where an output is beyond 65504. In a whole model a small difference",
    "moves some inputs of later layers over a tie of their rounding, which costs a whole step of their grids: then the",
    "precision of the sums counts for little, and a video ends at another sample.",
)


def _describe(config: BenchmarkConfig) -> str:
    """What would be measured."""
    return f"svdq_accumulation: K of {', '.join(map(str, WIDTHS))}, and {config.run.names.model}"


BENCHMARK = Benchmark(
    rows=accumulation_rows,
    table=accumulation_table,
    describe=_describe,
    group=("source", "inputs", "dtype"),
    real_weights=True,
)
