"""Cells of the benchmark ``ptq`` on a trained text encoder: what each PTQ method loses at real widths, by type of layer.

A cell's methods see sentences that nothing is measured on (:mod:`qvgen.evaluation.sentence_captions`); with another seed
they see others of them. Errors are relative squares: of the token states at the model's end, and of each Linear's own
output without its bias, on the inputs that it has in the full-precision model, mean over the blocks.
"""

from __future__ import annotations

import copy
import random
import re
import time
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from qvgen.config.bits import Bits
from qvgen.config.leaf_file import leaf_names
from qvgen.config.leaves import load_leaf
from qvgen.config.schema.train import TrainConfig
from qvgen.config.schema.verbs import BenchmarkConfig
from qvgen.errors import UserError
from qvgen.evaluation.sentence_captions import CALIBRATION, HELD_OUT
from qvgen.evaluation.sentence_encoder import (
    BEHIND_ATTENTION,
    BEHIND_GELU,
    INCLUDE,
    NUM_NOISE_BANDS,
    SHARED_INPUTS,
    SentenceEncoder,
    load_sentence_encoder,
    mean_cosine,
    tokenized,
)
from qvgen.initializers.base import LayerStatistics, Need
from qvgen.initializers.bit_budget import BitBudget
from qvgen.initializers.calibration import Calibration
from qvgen.initializers.clip_search import start_clips_
from qvgen.initializers.prepare import PrepareConfig, initialize_, prepare
from qvgen.layers.shared_input import shared_input_sets
from qvgen.layers.swap import folded_copy, quantized_layers
from qvgen.verbs._autoencoder import text_encoder_folder
from qvgen.verbs._parts import ptq_method

CALIBRATION_SENTENCES = 48
"""Sentences that a seed draws of those for calibration."""

MINILM = "minilm"

ABOUT_ENCODER = (
    f"Measured on {len(HELD_OUT)} sentences; a method that needs inputs sees {CALIBRATION_SENTENCES} of {len(CALIBRATION)} "
    "others, which its seed draws (one that needs none has one seed, and a spread of 0). Layers are measured on the inputs "
    "that they have in the full-precision encoder, without their biases. Not measured: vidit_q_mp, which gives layers bits "
    "by what sampled videos lose."
)
"""What the page says of how it was measured."""

_BITS_BY_VIDEOS = "gives layers bits by what sampled videos lose, and an encoder makes none"


def encoder_folder(encoder: str) -> Path:
    """Where the files of ``encoder`` lie: of the fetched asset for ``minilm``, else it is a folder.

    Raises:
        UserError: The asset was not fetched (it says how to), or the folder is none of a model.
    """
    folder = text_encoder_folder() if encoder == MINILM else Path(encoder).expanduser()
    if not (folder / "config.json").is_file():
        raise UserError(f"encoder={encoder}: {folder} has no config.json; give minilm, or a BertModel's folder")
    return folder


def encoder_methods(config: BenchmarkConfig) -> list[str]:
    """The methods that are compared: all but those that choose bits by videos.

    Raises:
        UserError: Such a one was asked for by name.
    """
    found = []
    for name in config.methods or leaf_names("init"):
        leaf = load_leaf("init", name.partition("+r")[0])
        if isinstance(leaf, BitBudget):
            if config.methods is not None:
                raise UserError(
                    f"methods holds {name}, which {_BITS_BY_VIDEOS}; leave it out, or measure a video model"
                )
            continue
        rotations = () if config.methods is not None else getattr(leaf, "compared_rotations", ())
        found += [name, *(f"{name}+r{rotation}" for rotation in rotations)]
    return found


def encoder_cells(config: BenchmarkConfig) -> list[tuple[int, Bits, str]]:
    """Seed, bits and method of every cell; a method that samples nothing has the first seed alone."""
    return [
        (seed, width, name)
        for seed in config.seeds
        for width in config.widths
        for name in encoder_methods(config)
        if seed == config.seeds[0] or load_leaf("init", name.partition("+r")[0]).needs
    ]


@dataclass(frozen=True, kw_only=True, eq=False)
class _Bench:
    """The full-precision encoder with what is measured on.

    Attributes:
        model: The encoder.
        calibration: Tokens of all sentences for calibration.
        held_out: Tokens of the sentences that are measured on.
        states: Token states of those.
        inputs: Name of a Linear -> its inputs float32 [n, K] in those sentences.
        collected: Statistics by seed.
    """

    model: SentenceEncoder
    calibration: Sequence[Tensor]
    held_out: Sequence[Tensor]
    states: Sequence[Tensor]
    inputs: Mapping[str, Tensor]
    collected: dict[int, Calibration] = field(default_factory=dict)

    def statistics(self, seed: int, names: Sequence[str]) -> Callable[[str], LayerStatistics]:
        """A Linear's name -> all kinds of statistics of the sentences that a seed draws, collected when first asked for."""
        if seed not in self.collected:
            drawn = random.Random(seed).sample(self.calibration, min(CALIBRATION_SENTENCES, len(self.calibration)))
            with Calibration(
                self.model, names=names, needs=get_args(Need), num_bands=NUM_NOISE_BANDS, seed=seed
            ) as calibration:
                self.model.states(drawn)
            self.collected.clear()  # cells of one seed follow each other
            self.collected[seed] = calibration
        return self.collected[seed].statistics


def _open_bench(folder: Path) -> _Bench:
    model, tokenizer = load_sentence_encoder(folder)
    held_out = tokenized(tokenizer, HELD_OUT)
    linears = {name: part for name, part in model.named_modules() if isinstance(part, nn.Linear)}
    rows: dict[str, list[Tensor]] = {name: [] for name in linears}

    def keep(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda module, inputs: rows[name].append(inputs[0].flatten(0, -2))  # noqa: ARG005

    with ExitStack() as stack:
        for name, linear in linears.items():
            stack.callback(linear.register_forward_pre_hook(keep(name)).remove)
        states = model.states(held_out)
    return _Bench(
        model=model, calibration=tokenized(tokenizer, CALIBRATION), held_out=held_out, states=states,
        inputs={name: torch.cat(found) for name, found in rows.items()},
    )  # fmt: skip


def encoder_rows(
    config: BenchmarkConfig,
    *,
    done: Container[tuple[Any, ...]],
    cell: Callable[[TrainConfig, str, Bits], TrainConfig],
) -> Iterator[dict[str, Any]]:
    """One row per cell of :func:`encoder_cells`, in this order; ``done`` holds those that are left out."""
    assert config.encoder is not None
    missing = [key for key in encoder_cells(config) if (key[0], key[1].label, key[2]) not in done]
    if not missing:
        return
    bench = _open_bench(encoder_folder(config.encoder))
    for seed, width, name in missing:
        run = cell(replace(config.run, seed=seed), name, width)
        student, seconds = _quantized(run, bench)
        states = student.states(bench.held_out)
        yield {
            "method": name, "bits": width.label, "seed": seed, **seconds,
            "mean_weight_bits": width.weight, "mean_activation_bits": width.activation,
            "relative_error": _relative(torch.cat(states), torch.cat(list(bench.states))),
            "cosine": mean_cosine(states, bench.states),
            "layers": _layer_errors(student, bench),
            "bytes": sum(value.numel() * value.element_size() for value in folded_copy(student).state_dict().values()),
        }  # fmt: skip


def _quantized(run: TrainConfig, bench: _Bench) -> tuple[SentenceEncoder, dict[str, float]]:
    """A copy of the encoder that the cell's method has set up, and the seconds that calibration and method took."""
    student = copy.deepcopy(bench.model)
    start = PrepareConfig(
        profile=run.profile, initializer=load_leaf("init", "rtn"), include=INCLUDE, num_noise_bands=NUM_NOISE_BANDS,
        seed=run.seed,
    )  # fmt: skip
    names = prepare(student, start).quantized
    layers = quantized_layers(student)
    for name, layer in layers.items():
        if name.endswith(BEHIND_GELU) and not name.endswith(BEHIND_ATTENTION):
            layer.input_kind = "gelu"
            layer.declare_(profile=layer.profile, input_scale=None)
    ptq, began = ptq_method(run), time.monotonic()
    statistics = bench.statistics(run.seed, names) if ptq.needs(run.profile) else None
    calibrated = time.monotonic()
    seen = initialize_(student, run.init, seed=run.seed, statistics=statistics)
    if seen is not None and ptq.searches_clips:
        start_clips_(layers, shared_input_sets(names, SHARED_INPUTS), statistics=seen)
    return student, {"calibration_s": calibrated - began, "method_s": time.monotonic() - calibrated}


@torch.no_grad()
def _layer_errors(student: SentenceEncoder, bench: _Bench) -> dict[str, float]:
    """Relative error of the outputs of each type of layer, by its name in a block."""
    found: dict[str, list[float]] = {}
    for name, layer in quantized_layers(student).items():
        layer.noise_band.set_timestep(torch.zeros(1))
        rows, linear = bench.inputs[name], bench.model.get_submodule(name)
        exact = functional.linear(rows, linear.weight)
        bias = 0.0 if linear.bias is None else linear.bias
        kind = re.sub(r"^.*\.layer\.\d+\.", "", name)
        found.setdefault(kind, []).append(_relative(layer(rows[None])[0] - bias, exact))
    return {kind: fmean(errors) for kind, errors in found.items()}


def _relative(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).double().square().sum() / exact.double().square().sum())
