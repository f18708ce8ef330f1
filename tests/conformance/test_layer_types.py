"""PTQ methods of quality.py against round-to-nearest on the small trained model, type of layer by type of layer.

A layer gets the input that it has in the full-precision model, for held-out clips and noise levels; its error is
|y - y_exact|^2 / |y_exact|^2 over all layers of its type (``blocks.*.attn1.to_q``). The claim is that no method is worse than
round-to-nearest on any type but for those that quality.py names, with the ratio that each may have.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from qvgen.evaluation.held_out import HeldOut
from qvgen.initializers.prepare import initialize_
from qvgen.layers.swap import not_sampling, quantized_layers
from tests.conformance.quality import QUALITY
from tests.parts import calibrated, prepared
from tests.runs import train_config

METHODS = [name for name, quality in QUALITY.items() if quality.layer_types is not None]
BITS = ("w4a8", "3")
TYPES = 16

Errors = dict[str, dict[str, float]]
Measure = Callable[[str, str], Errors]


def type_of(name: str) -> str:
    return re.sub(r"^blocks\.\d+", "blocks.*", name)


@pytest.fixture(scope="module")
def measure(tmp_path_factory: pytest.TempPathFactory) -> Measure:
    """Errors of a method's outputs and weights by type of layer; what was measured once is kept."""
    cache, done = tmp_path_factory.mktemp("calibration"), {}

    def found(name: str, bits: str) -> Errors:
        if (name, bits) not in done:
            done[name, bits] = errors(name, bits, cache)
        return done[name, bits]

    return found


def errors(name: str, bits: str, cache: Path) -> Errors:
    config = train_config(
        *f"init={name}".split(), f"bits={bits}", f"calibration.cache={cache}", "calibration.videos=8", "calibration.steps=4",
        "model.num_inference_steps=4",
    )  # fmt: skip
    teacher = config.model.load_teacher()
    split = config.data.open(config.model, split="held_out")
    student, _ = prepared(config)
    statistics, _ = calibrated(config, student, teacher=teacher, encode=split.encode)
    initialize_(student, config.init, seed=config.seed, statistics=statistics)
    layers = quantized_layers(student)
    sums: defaultdict[tuple[str, str], Tensor] = defaultdict(lambda: torch.zeros(2, dtype=torch.float64))
    for key, layer in layers.items():
        linear = teacher.get_submodule(key)
        linear.register_forward_hook(compare(layer, sums["output", type_of(key)]))
        if (
            layer.branch_down is None
        ):  # in the layer's own coordinates, where the norm of a rotated weight is the weight's
            weight = layer.weight.detach()
            sums["weight", type_of(key)] += squares(layer.quantized_weight() - weight, weight)
    noise_band = next(iter(layers.values())).noise_band
    with not_sampling(student), torch.no_grad():
        for batch in HeldOut(config.model, split, num_samples=12, seed=1, batch_size=12)._batches:
            noise_band.set_timestep(batch.timestep)
            config.model.predict(teacher, batch.noisy, batch.timestep, split.encode(batch.captions))
    result: Errors = {"output": {}, "weight": {}}
    for (what, kind), (error, norm) in sums.items():
        result[what][kind] = float(error / norm)
    return result


def compare(layer: nn.Module, total: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
    def hook(_: nn.Module, inputs: tuple[Tensor, ...], exact: Tensor) -> None:
        total.add_(squares(layer(inputs[0]) - exact, exact))

    return hook


def squares(error: Tensor, exact: Tensor) -> Tensor:
    return torch.stack([error.detach().double().square().sum(), exact.detach().double().square().sum()])


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name", METHODS)
def test_no_type_of_layer_is_worse_than_round_to_nearest(name: str, bits: str, measure: Measure) -> None:
    plain, found = measure("rtn", bits)["output"], measure(name, bits)["output"]
    assert plain.keys() == found.keys()
    assert len(plain) == TYPES
    ratios = {kind: found[kind] / plain[kind] for kind in plain}
    allowed = QUALITY[name].layer_types
    worse = {kind: ratio for kind, ratio in ratios.items() if ratio > allowed.get(kind, allowed.get("*", 1.0))}
    assert not worse
    # And better on most of them.
    assert sorted(ratios.values())[TYPES // 2] < 1


@pytest.mark.parametrize("bits", BITS)
def test_a_searched_range_has_the_smaller_weight_error(bits: str, measure: Measure) -> None:
    """Which is what mse minimizes, on every type of layer without an exception."""
    plain, found = measure("rtn", bits)["weight"], measure("mse", bits)["weight"]
    assert {kind: found[kind] / plain[kind] for kind in plain if found[kind] > plain[kind]} == {}


def test_the_exceptions_name_types_of_layers(measure: Measure) -> None:
    types = measure("rtn", BITS[0])["output"]
    assert {kind for name in METHODS for kind in QUALITY[name].layer_types} <= {"*", *types}
