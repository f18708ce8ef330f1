"""PTQ methods of quality.py against round-to-nearest on the small trained model, type of layer by type of layer.

A layer gets the input that it has in the full-precision model, for held-out clips and noise levels; its error is
|y - y_exact|^2 / |y_exact|^2 over all layers of its type (``blocks.*.attn1.to_q``). The claim is that no method is worse than
round-to-nearest on any type but for those that quality.py names, with the ratio that each may have.
"""

from __future__ import annotations

import itertools
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

from qvgen.config import TrainConfig
from qvgen.config.leaves import load_leaf
from qvgen.data.source import Split
from qvgen.evaluation.held_out import HeldOut
from qvgen.initializers.clip_search import start_clips_
from qvgen.initializers.prepare import initialize_
from qvgen.layers.swap import not_sampling, quantized_layers
from qvgen.verbs._parts import ptq_method
from tests.conformance.quality import QUALITY
from tests.parts import calibrated, prepared
from tests.runs import train_config

METHODS = [name for name, quality in QUALITY.items() if quality.layer_types is not None]
BITS = ("w4a8", "3")
TYPES = 16
SETTINGS = ("calibration.videos=8", "calibration.steps=4", "model.num_inference_steps=4")

Errors = dict[str, dict[str, float]]
Measure = Callable[[str, str], Errors]


def type_of(name: str) -> str:
    return re.sub(r"^blocks\.\d+", "blocks.*", name)


@dataclass(frozen=True)
class Exact:
    """The full-precision model, and what each of its Linears reads and gives for held-out clips."""

    teacher: nn.Module
    split: Split
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    timestep: Tensor


@pytest.fixture(scope="module")
def exact() -> Exact:
    config = train_config(*SETTINGS)
    teacher = config.model.load_teacher()
    split = config.data.open(config.model, split="held_out")
    (batch,) = HeldOut(config.model, split, num_samples=12, batch_size=12)._batches
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def keep(key: str, given: Tensor, output: Tensor) -> None:
        inputs[key], outputs[key] = given, output

    linears = {key: module for key, module in teacher.named_modules() if isinstance(module, nn.Linear)}
    hooks = [
        linear.register_forward_hook(lambda _, given, output, key=key: keep(key, given[0], output))
        for key, linear in linears.items()
    ]
    with torch.no_grad():
        config.model.predict(teacher, batch.noisy, batch.timestep, split.encode(batch.captions))
    for hook in hooks:
        hook.remove()
    return Exact(teacher, split, inputs, outputs, batch.timestep)


@pytest.fixture(scope="module")
def measure(exact: Exact, tmp_path_factory: pytest.TempPathFactory) -> Measure:
    """Errors of a method's outputs and weights by type of layer; what was measured once is kept."""
    kept = f"calibration.cache={tmp_path_factory.mktemp('calibration')}"

    @cache
    def found(name: str, bits: str) -> Errors:
        method, *changes = name.split()
        arguments = {key.removeprefix("init."): yaml.safe_load(value) for key, value in (c.split("=") for c in changes)}
        config = train_config(*SETTINGS, f"bits={bits}", kept)
        return errors(replace(config, init=load_leaf("init", method, **arguments)), exact)

    return found


def errors(config: TrainConfig, exact: Exact) -> Errors:
    student, _ = prepared(config)
    statistics, _ = calibrated(config, student, teacher=exact.teacher, encode=exact.split.encode)
    seen = initialize_(student, config.init, seed=config.seed, statistics=statistics)
    layers = quantized_layers(student)
    if seen is not None and ptq_method(config).searches_clips:
        start_clips_(layers, (), statistics=seen)
    sums: defaultdict[tuple[str, str], Tensor] = defaultdict(lambda: torch.zeros(2, dtype=torch.float64))
    with not_sampling(student), torch.no_grad():
        next(iter(layers.values())).noise_band.set_timestep(exact.timestep)
        for key, layer in layers.items():
            wanted = exact.outputs[key]
            sums["output", type_of(key)] += squares(layer(exact.inputs[key]) - wanted, wanted)
            if layer.branch_down is None:  # in the layer's own coordinates, where the norm is the weight's
                weight = layer.weight
                sums["weight", type_of(key)] += squares(layer.quantized_weight() - weight, weight)
    result: Errors = {"output": {}, "weight": {}}
    for (what, kind), (error, norm) in sums.items():
        result[what][kind] = float(error / norm)
    return result


def squares(error: Tensor, exact: Tensor) -> Tensor:
    return torch.stack([error.detach().double().square().sum(), exact.detach().double().square().sum()])


def combinations() -> Iterator[Any]:
    """Every method at one of the two widths, in turn, and at both where that takes no calibration; all when asked for."""
    for index, (name, bits) in enumerate(itertools.product(METHODS, BITS)):
        rarely = name not in ("mse", "dvd_quant") and (index // 2 + index) % 2 == 1
        yield pytest.param(name, bits, marks=[LONG] if rarely else [])


LONG = pytest.mark.skipif(
    os.environ.get("QVGEN_LONG_TESTS") != "1", reason="set QVGEN_LONG_TESTS=1 to have every method at both widths"
)


@pytest.mark.parametrize(("name", "bits"), list(combinations()))
def test_no_type_of_layer_is_worse_than_round_to_nearest(name: str, bits: str, measure: Measure) -> None:
    plain, found = measure("rtn", bits)["output"], measure(name, bits)["output"]
    assert plain.keys() == found.keys()
    assert len(plain) == TYPES
    ratios = {kind: found[kind] / plain[kind] for kind in plain}
    allowed = QUALITY[name].layer_types
    worse = {kind: ratio for kind, ratio in ratios.items() if ratio > allowed.get(kind, allowed.get("*", 1.0))}
    assert not worse
    # And better on most of them.
    assert sorted(ratios.values())[TYPES // 2] < QUALITY[name].most_types


@pytest.mark.parametrize("bits", BITS)
def test_a_searched_range_has_the_smaller_weight_error(bits: str, measure: Measure) -> None:
    """Which is what mse minimizes, on every type of layer without an exception."""
    plain, found = measure("rtn", bits)["weight"], measure("mse", bits)["weight"]
    assert {kind: found[kind] / plain[kind] for kind in plain if found[kind] > plain[kind]} == {}


def test_the_exceptions_name_types_of_layers(measure: Measure) -> None:
    types = measure("rtn", BITS[0])["output"]
    assert {kind for name in METHODS for kind in QUALITY[name].layer_types} <= {"*", *types}
