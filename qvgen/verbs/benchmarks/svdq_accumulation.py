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
from qvgen.config.schema import TrainConfig
from qvgen.config.verb_schema import BenchmarkConfig
from qvgen.deploy.exporters.svdq_layer import SvdqForm, svdq_half_output, svdq_output
from qvgen.deploy.exporters.svdq_tiles import GROUP
from qvgen.deploy.fixed_inputs import fixed_inputs
from qvgen.evaluation.metrics import psnr_db
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
        self.layer, self.full = layer, full
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
def model_row(run: TrainConfig, dtype: str, *, seed: int, videos: int) -> dict[str, Any]:
    """Measure every layer of a model on its own inputs, and the model's videos."""
    family = run.model
    model = family.load_teacher(dtype=torch.float32)
    originals = {name: model.get_submodule(name) for name in _names(model, run)}
    prepare(
        model,
        PrepareConfig(
            profile=svdq_profile(dtype),
            initializer=load_leaf("init", "mse"),
            include=family.include,
            exclude=family.exclude,
        ),
    )
    fold(model, kernel="reference")
    layers = {}
    for name, layer in packed_layers(model).items():
        full = originals[name]
        assert isinstance(full, nn.Linear)
        layers[name] = SvdqLinear(layer, dtype=dtype, full=full)
        model.set_submodule(name, layers[name])
    captions = [family.prompts[index % len(family.prompts)] for index in range(videos)]
    seeds = [seed + index for index in range(videos)]
    sampling = {"num_steps": family.num_inference_steps, "guidance_scale": family.guidance_scale}
    full_video = family.generate(family.load_teacher(dtype=torch.float32), captions, seeds, **sampling)
    inputs = fixed_inputs(model, timestep=500.0)
    found, calls = {}, {}
    for half in (False, True):
        for layer in layers.values():
            layer.half = half
        found[half] = family.generate(model, captions, seeds, **sampling)
        calls[half] = None if inputs is None else model(**inputs, return_dict=False)[0]
    rows = []
    for layer in layers.values():
        assert layer.seen is not None
        wanted = nn.functional.linear(layer.seen, layer.full.weight, layer.full.bias)
        rows.append(compare_sums(layer.layer, layer.seen, wanted, dtype=dtype))
    worst = {key: max(row[key] for row in rows) for key in rows[0]}
    of_call = {} if inputs is None else {"call_error": float((calls[True] - calls[False]).norm() / calls[False].norm())}
    return {
        **worst,
        **of_call,
        "layers": len(rows),
        "videos": videos,
        "psnr_db": psnr_db(found[True], found[False], max_value=255),
        "quantized_to_full_db": psnr_db(found[False], full_video, max_value=255),
    }


def _names(model: nn.Module, run: TrainConfig) -> Sequence[str]:
    return select_linears(model, include=run.model.include, exclude=run.model.exclude).quantized


def accumulation_table(head: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The Markdown page."""
    model = next((row for row in rows if "layers" in row), None)
    of_model = [] if model is None else [
        f"The rows of {model['source']} hold the largest values of its {model['layers']} layers on their own inputs, the",
        f"difference of its output in one call, and PSNRs of {model['videos']} videos in dB: to those with exact sums, and of",
        "those with exact sums to full precision.",
    ]  # fmt: skip
    columns = [
        "layer", "inputs", "precision", "groups", "difference of the sums", "largest, of the largest output",
        "error of quantization itself", "model's output", "videos", "quantized videos to full precision",
    ]  # fmt: skip
    return [
        "# Sums in half precision in SVDQuant's W4A4 kernels",
        "",
        f"{head['machine']['cpu']}, torch {head['versions']['torch']}; profile svdq_g64, W4A4, no quantization-aware training.",
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
    call, videos = row.get("call_error"), [row.get(key) for key in ("psnr_db", "quantized_to_full_db")]
    cells = [
        row["source"], row["inputs"], row["dtype"], str(row["groups"]), f"**{row['sums_error']:.2%}**",
        f"{row['sums_max_abs']:.2%}", f"{row['quantization_error']:.1%}", "-" if call is None else f"{call:.2%}",
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
    "an eighth of bfloat16's difference, and overflows where an output is beyond 65504. A video is many steps, in each of",
    "which small differences move some inputs over a tie: it may end at another sample.",
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
