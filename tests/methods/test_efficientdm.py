"""``method=efficientdm``: what is trained and what is merged, in float64; resumed and sharded runs to the same bits.

The formulas are those of qvgen/methods/efficientdm.py, taken from the paper.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from qvgen.cli import DONE
from qvgen.layers.swap import fold, quantized_layers
from qvgen.layers.weight_adapter import WeightAdapter
from tests.layers.model import TIMESTEPS, make_layer, make_rows
from tests.parts import planned, prepared
from tests.runs import UNSEEN, copy_until, load_state, packed_bytes, read_metrics, shallow, train, train_config

OPTIONS = ("method=efficientdm", "steps=4", "checkpoint.every_steps=2", "checkpoint.keep=9", *shallow(1), *UNSEEN)


def adapted(*, rank: int = 2):
    layer = make_layer("paper", seed=3)
    layer.noise_band.set_timestep(TIMESTEPS)
    layer.adapter = WeightAdapter(out_features=layer.out_features, in_features=layer.in_features, rank=rank)
    unit = layer.weight_quantizer.qparams()[0].mean()
    layer.adapter.start_(unit=unit, generator=torch.Generator().manual_seed(0))
    return layer


def test_it_starts_without_a_change_and_its_gradients_are_scaled_by_the_mean_step() -> None:
    layer, plain, x = adapted(), make_layer("paper", seed=3), make_rows()
    plain.noise_band.set_timestep(TIMESTEPS)
    outputs = layer(x), plain(x)
    assert torch.equal(*outputs)
    bound = layer.in_features**-0.5 / float(layer.adapter.unit)
    assert 0.5 * bound < float(layer.adapter.right.detach().abs().max()) <= bound
    for y in outputs:
        y.square().sum().backward()
    unit, of_weight = layer.adapter.unit.double(), plain.weight.grad.double()
    assert torch.equal(layer.weight.grad, plain.weight.grad)
    wanted = unit * (of_weight @ (unit * layer.adapter.right.detach().double()).mT)  # dB = dW' (s A)^T, times s
    torch.testing.assert_close(
        layer.adapter.left.grad.double(), wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max())
    )


def test_the_merged_weight_is_what_is_quantized_and_what_stays() -> None:
    layer, x = adapted(), make_rows()
    with torch.no_grad():
        layer.adapter.left.normal_(0, 3, generator=torch.Generator().manual_seed(1))
    unit, left, right = (
        value.detach().double() for value in (layer.adapter.unit, layer.adapter.left, layer.adapter.right)
    )
    merged = layer.weight.detach().double() + (unit * left) @ (unit * right)
    before, codes = layer(x), layer.quantized_weight()
    method = train_config("method=efficientdm").method
    model = torch.nn.Sequential(layer)
    with pytest.raises(ValueError, match="cannot fold 0: its adapter is not merged"):
        fold(model)
    method.finish_(model)
    assert layer.adapter is None
    torch.testing.assert_close(layer.weight.detach().double(), merged, rtol=0, atol=1e-6)
    assert not torch.equal(codes, make_layer("paper", seed=3).quantized_weight())
    assert torch.equal(layer.quantized_weight(), codes)
    assert torch.equal(layer(x), before)
    method.finish_(model)  # nothing without one
    assert torch.equal(layer(x), before)


def test_only_factors_scales_and_clips_are_trained_and_planned() -> None:
    config = train_config(*OPTIONS)
    student, _ = prepared(config)
    groups = {group["name"]: group for group in config.method.parameter_groups(student, config.optim)}
    assert list(groups) == ["scales", "clips", "weights"]
    layers = quantized_layers(student)
    assert len(groups["weights"]["params"]) == 2 * len(layers)
    assert groups["weights"]["lr"] == 13.3 * config.optim.learning_rate
    plan = {part.name: part.nbytes for part in planned(config).memory}
    factors = sum(32 * (layer.in_features + layer.out_features) for layer in layers.values())
    others = sum(p.numel() for name in ("scales", "clips") for p in groups[name]["params"])
    assert plan["student: gradients, float32"] == 4 * (factors + others)
    assert plan["student: float32 masters"] == 4 * sum(p.numel() for p in student.parameters())


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("efficientdm") / "run"
    assert train(folder, *OPTIONS) == DONE
    return folder


def test_a_run_changes_no_weight_but_by_its_factors_and_packs_what_it_trained(run_dir: Path) -> None:
    report = json.loads((run_dir / "report.json").read_text())
    assert report["packed_codes_equal"] is True
    assert report["packed_vs_fake_max_abs"] == 0.0
    first, last = (load_state(run_dir / "checkpoints" / f"step-{step:08d}.ckpt") for step in (2, 4))
    changed = {name for name, value in first.items() if not torch.equal(value, last[name])}
    kinds = {name.rpartition(".")[2] for name in changed}
    assert kinds == {"left", "right", "scale", "zero_point", "clip_low", "clip_high"}
    assert all(name.rpartition(".")[0].endswith(("adapter", "quantizer")) for name in changed)
    rows = read_metrics(run_dir)
    assert all(float(row["train/gradient_norm_weights"]) > 0 and not row["train/gradient_norm_phi"] for row in rows)


def test_it_goes_on_after_a_kill_to_the_same_bytes(run_dir: Path, tmp_path: Path) -> None:
    again = copy_until(run_dir, tmp_path / "run", step=2)
    assert train(again, *OPTIONS, "resume=true") == DONE
    assert packed_bytes(again) == packed_bytes(run_dir)
    assert read_metrics(again) == read_metrics(run_dir)


def test_two_processes_that_share_the_model_train_the_same_bytes(run_dir: Path, tmp_path: Path) -> None:
    assert train(tmp_path / "run", *OPTIONS, "devices=2", "strategy=fsdp") == DONE
    assert packed_bytes(tmp_path / "run") == packed_bytes(run_dir)
    assert read_metrics(tmp_path / "run") == read_metrics(run_dir)
