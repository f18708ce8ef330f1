"""Numbers of a student's layers against numpy on the layers themselves, and the norms of groups against torch's own."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from qvgen.layers.swap import quantized_layers
from qvgen.lowrank.phi import Phi
from qvgen.training.optimizer_module import gradient_norms
from qvgen.training.student_metrics import POINTS, STUDENT_COLUMNS, is_looked_at, singular_values, student_metrics
from tests.layers.model import prepared_model
from tests.profiles import make_profile
from tests.runs import read_metrics


def test_share_of_small_singular_values_and_clips_by_noise_level() -> None:
    model = prepared_model(make_profile("paper"), phi_rank=4)
    layers = list(quantized_layers(model).values())
    for index, layer in enumerate(layers):
        with torch.no_grad():
            for column in range(4):  # others become small in each layer
                layer.phi.left[:, column] *= 10.0 ** -((column + index) % 4)
            layer.phi.rank_gate[2:] = 0.25  # the schedule's, which is left out
    found = student_metrics(model)
    small = total = 0
    for layer in layers:
        product = layer.phi.left.detach().double().numpy() @ layer.phi.right.detach().double().numpy()
        values = np.linalg.svd(product, compute_uv=False)[:4]
        small, total = small + int((values < 0.1 * values.max()).sum()), total + 4
    assert 0 < small < total
    assert found["phi/small_share"] == pytest.approx(small / total, abs=1e-12)
    for side in ("low", "high"):
        tables = torch.stack([getattr(layer.activation_quantizer, f"clip_{side}").detach() for layer in layers])
        by_band = tables.double().sigmoid().mean(0)  # five bands: a window each
        assert [found[f"clip/{side}_t{start}"] for start in (0, 200, 400, 600, 800)] == pytest.approx(by_band.tolist())
        assert len(set(by_band.tolist())) == 5
    assert set(found) == set(STUDENT_COLUMNS)


def test_there_is_nothing_to_say_of_what_is_not_there() -> None:
    model = prepared_model(make_profile("convrot"))  # symmetric, and no Phi
    assert not any(name.startswith(("phi/", "clip/low")) for name in student_metrics(model))
    assert student_metrics(torch.nn.Linear(2, 2)) == {}
    phi = Phi(out_features=6, in_features=5, rank=2)
    with torch.no_grad():
        phi.right.normal_()
    grams = [(phi.left.T @ phi.left).detach().double(), (phi.right @ phi.right.T).detach().double()]
    assert singular_values(*grams).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("num_steps", [1, 7, 100, 220, 16_000])
def test_about_a_hundred_steps_are_looked_at(num_steps: int) -> None:
    steps = [step for step in range(num_steps) if is_looked_at(step, num_steps=num_steps)]
    assert (steps[0], steps[-1]) == (0, num_steps - 1)
    assert min(num_steps, POINTS) <= len(steps) <= 2 * POINTS


def test_norms_of_parts_and_the_whole() -> None:
    gradients = [torch.randn(5, 3, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    found = [float(norm) for norm in gradient_norms(gradients, [[0, 2], [], [3]])]
    squares = [float(gradient.double().square().sum()) for gradient in gradients]
    wanted = [sum(squares), squares[0] + squares[2], 0.0, squares[3]]
    assert found == pytest.approx([math.sqrt(value) for value in wanted], rel=1e-6)


def test_a_run_logs_them_apart(short_run: Path) -> None:
    rows = read_metrics(short_run)
    for row in rows:
        parts = [float(row[f"train/gradient_norm_{name}"]) for name in ("weights", "phi")]
        assert 0 < parts[0] < float(row["train/gradient_norm"])
        assert (parts[1] > 0) == (int(row["phi/rank"]) > 1 or float(row["phi/gamma_min"]) > 0)
        assert math.hypot(*parts) < float(row["train/gradient_norm"])
        assert bool(row["phi/small_share"]) == (int(row["phi/rank"]) > 0)
        assert 0.5 < float(row["clip/high_t400"]) < 1.0
