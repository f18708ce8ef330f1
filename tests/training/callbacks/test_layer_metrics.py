"""The table of layers against float64 arithmetic on the layers themselves; what a killed or damaged run leaves of it."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import lightning
import numpy as np
import pytest
import torch

from qvgen.evaluation.layer_history import LAYER_COLUMNS, LAYER_FILE, layer_histories, read_layer_rows
from qvgen.evaluation.report.heat_map import draw_heat_map
from qvgen.layers.swap import quantized_layers
from qvgen.training.callbacks.layer_metrics import LayerMetrics, layer_numbers
from qvgen.training.callbacks.steps import write_table
from qvgen.training.module import VideoTraining
from tests.layers.model import prepared_model
from tests.profiles import make_profile


def test_numbers_of_layers() -> None:
    model = prepared_model(make_profile("paper"), phi_rank=3)
    layers = quantized_layers(model)
    with torch.no_grad():
        for layer in layers.values():
            layer.phi.right.normal_(generator=torch.Generator().manual_seed(0))
            layer.phi.rank_gate[1] = 0.25
    rows = layer_numbers(model)
    assert [row["layer"] for row in rows] == list(layers)
    for row, layer in zip(rows, layers.values(), strict=True):
        scale, zero = (value.double().numpy() for value in layer.weight_quantizer.qparams())
        weight = layer.weight.detach().double().numpy()
        codes = np.clip(np.round(weight / scale + zero), 0, 2**layer.profile.weight.bits - 1)
        error = weight - (codes - zero) * scale
        assert row["weight_sqnr_db"] == pytest.approx(10 * math.log10((weight**2).sum() / (error**2).sum()), abs=1e-2)
        product = layer.phi.left.detach().double().numpy() @ layer.phi.right.detach().double().numpy()
        values = np.linalg.svd(product, compute_uv=False)[:3]
        assert (row["phi_rank"], row["phi_gate"]) == (3, 0.25)
        assert row["phi_sigma_max"] == pytest.approx(values[0], rel=1e-6)
        assert row["phi_sigma_min"] == pytest.approx(values[2], rel=1e-4)
        low = layer.activation_quantizer.clip_low.detach().double().numpy()
        assert row["clip_low"] == pytest.approx((1 / (1 + np.exp(-low))).mean(), rel=1e-6)


def test_an_adapter_belongs_to_the_weight_and_what_is_not_there_is_left_out() -> None:
    model = prepared_model(make_profile("convrot"))  # symmetric, and no Phi
    layer = next(iter(quantized_layers(model).values()))
    before = layer_numbers(model)[0]
    assert not {"clip_low", "phi_rank", "phi_sigma_max"} & before.keys()
    from qvgen.layers.weight_adapter import WeightAdapter

    layer.adapter = WeightAdapter(out_features=layer.out_features, in_features=layer.in_features, rank=2)
    assert layer_numbers(model)[0] == before  # it begins without a change
    with torch.no_grad():
        layer.adapter.left.fill_(0.1)
        layer.adapter.right.fill_(0.1)
    assert layer_numbers(model)[0] != before
    assert layer_numbers(torch.nn.Linear(2, 2)) == []


def write_rows(path: Path, steps: range) -> None:
    rows = [
        {"step": str(step), "layer": name, "weight_sqnr_db": str(10 + step), "phi_rank": "2" if step < 2 else ""}
        for step in steps
        for name in ("a", "b")
    ]
    write_table(path, LAYER_COLUMNS, rows)


def test_a_session_keeps_the_rows_before_it_and_sets_a_damaged_table_aside(tmp_path: Path) -> None:
    path = tmp_path / LAYER_FILE
    write_rows(path, range(5))
    with path.open("a") as file:
        file.write("5,a,tall,,,,,,\n")
    model = prepared_model(make_profile("paper"))
    module = VideoTraining.__new__(VideoTraining)
    torch.nn.Module.__init__(module)
    module.student = model
    trainer = SimpleNamespace(global_step=3, is_global_zero=True)
    LayerMetrics(tmp_path, num_steps=9).on_train_start(trainer, module)  # type: ignore[arg-type]
    assert [row["step"] for row in read_layer_rows(path)[0]] == ["0", "0", "1", "1", "2", "2"]
    assert "tall" in (tmp_path / f"{LAYER_FILE}.damaged-1").read_text()
    assert isinstance(module, lightning.LightningModule)


def test_a_picture_names_what_differs_in_the_names_of_layers(tmp_path: Path) -> None:
    path = tmp_path / LAYER_FILE
    write_rows(path, range(4))
    histories = layer_histories(read_layer_rows(path)[0])
    assert histories.keys() == {"weight_sqnr_db", "phi_rank"}
    assert np.array_equal(histories["phi_rank"].values, [[2, 2, np.nan, np.nan]] * 2, equal_nan=True)
    chart = draw_heat_map(histories["weight_sqnr_db"], title="SQNR")
    assert all(f">{text}<" in chart.svg for text in ("a", "b", "3", "step"))
    assert chart.note == ""
    many = {"step": "0", "weight_sqnr_db": "1"}
    rows = [{**many, "layer": f"blocks.{index}.attn1.to_q"} for index in range(100)]
    chart = draw_heat_map(layer_histories(rows)["weight_sqnr_db"], title="SQNR")
    assert chart.note == "One in 3 of 100 layers is named."
    assert ">99.attn1.to_q<" in chart.svg
    assert ">98.attn1.to_q<" not in chart.svg
