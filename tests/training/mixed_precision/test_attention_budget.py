"""Attentions as units of mixed precision: their sensitivity and cost by other ways, the allocation, and the manifest.

The other way to a sensitivity: the model with attention by torch's operations of the contract's reference, put there as its
packed form and not by the probe. The other way to an allocation: all of them.
"""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import nn

from qvgen.cli import BAD_INPUT, DONE, main
from qvgen.deploy.checkpoint import load_packed
from qvgen.errors import UserError
from qvgen.evaluation.mixed_precision_files import Sensitivity, read_allocation
from qvgen.layers.attention_form import AttentionForm
from qvgen.layers.attention_swap import (
    attention_forms,
    packed_attentions,
    put_product_,
    quantized_attentions,
)
from qvgen.layers.noise_band import NoiseBand
from qvgen.layers.quant_attention import PackedAttention
from qvgen.quant.attention_profile import AttentionKind, AttentionProfile
from qvgen.training.mixed_precision.allocation import plan_measurements
from qvgen.training.mixed_precision.attention_budget import (
    AttentionMeasurement,
    allocate_attentions,
    check_attention_budget,
    measure_attentions,
    wanted_attentions,
)
from qvgen.training.mixed_precision.sensitivity import SEED_OFFSET, Measured, SensitivityMeasurement
from qvgen.training.start.run_calibration import sample_share
from qvgen.verbs._parts import ptq_method, sampled_teacher
from tests.parts import calibrated, calibrated_model, prepared
from tests.runs import UNSEEN, copy_until, packed_bytes, shallow, train, train_config

FAST = (
    "init=vidit_q_mp", "init.visual=ssim", "init.videos=1", "init.steps=2", "init.windows=1", "bits=w4a8",
    "calibration.videos=1", "calibration.steps=2", "profile.attention=int8",
)  # fmt: skip


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory):
    """A configuration of one block, its attentions' forms, the measurements that are asked for, and their results."""
    config = train_config(*FAST, *shallow(1), "init.mean_attention_bits=12")
    cache = str(tmp_path_factory.mktemp("cache"))
    config = replace(config, calibration=replace(config.calibration, cache=cache))
    transformer = config.model.load_teacher()
    statistics = calibrated_model(config, teacher=transformer, encode=config.model.encode)
    teacher = sampled_teacher(config, transformer, encode=config.model.encode)
    base = SensitivityMeasurement(teacher=teacher, init=config.init, profile=config.profile, statistics=statistics)
    linears = [name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)]
    forms = attention_forms(transformer, config.profile.attention, quantized=linears)
    return config, forms, base, *measure_attentions(base, forms)


def test_a_units_sensitivity_is_that_of_a_model_whose_attention_is_the_references(measured) -> None:
    config, forms, _, wanted, found = measured
    family = config.model
    assert [unit.name for unit in wanted.units] == ["cross_attention:blocks.0", "self_attention:blocks.0"]

    def sampled(model: nn.Module) -> torch.Tensor:
        return family.generate(
            model, [family.prompts[0]], [config.seed + SEED_OFFSET], num_steps=2, guidance_scale=family.guidance_scale
        )

    exact = sampled(family.load_teacher().eval()).double()
    for unit in wanted.units:
        model = family.load_teacher().eval()
        product = PackedAttention(forms[unit.module], noise_band=NoiseBand(50), name=unit.module, kernel="reference")
        put_product_(model.get_submodule(unit.module), product)
        error = float((sampled(model).double() - exact).square().mean()) / 255**2
        row = found.rows[unit.group, unit.block, "attention", 8, 0]
        assert row.output_error == pytest.approx(error, rel=1e-12)
        assert row.output_error > 0
    assert list(found.rows[wanted.units[0].group, "blocks.0", "attention", 8, 0].scores) == ["attention output"]
    assert 0 < found.rows[wanted.units[0].group, "blocks.0", "attention", 8, 0].scores["attention output"] < 0.1


def test_the_full_precision_model_is_what_it_was(measured) -> None:
    _, _, base, _, _ = measured
    assert not quantized_attentions(base.teacher.transformer)
    assert not any("forward" in vars(module) for module in base.teacher.transformer.modules())


def test_what_an_attention_costs_is_its_products(measured) -> None:
    config, forms, _, wanted, found = measured
    samples = 2 if config.model.guidance_scale > 1 else 1
    frames, height, width = config.model.sample_shape[1:]
    patch = config.model.transformer_config["patch_size"]
    tokens = (frames // patch[0]) * (height // patch[1]) * (width // patch[2])
    keys = {"attn1": tokens, "attn2": config.model.condition_shape[0]}
    for unit in wanted.units:
        form = forms[unit.module]
        each = form.heads * form.head_size * tokens * keys[unit.module.rpartition(".")[2]]
        assert found.values[unit.layers[0]] == 2 * samples * each


def test_rows_are_kept_and_those_of_another_form_are_others(measured, caplog: pytest.LogCaptureFixture) -> None:
    _, forms, base, _, found = measured
    caplog.set_level("INFO")
    _, again = measure_attentions(base, forms)
    assert again.rows == found.rows
    assert "2 of them stored" in caplog.text
    turned = AttentionMeasurement(
        teacher=base.teacher, init=base.init, profile=base.profile, statistics=base.statistics,
        forms={name: replace(form, rotation=True) for name, form in forms.items()},
    )  # fmt: skip
    assert turned.own_key() != replace(turned, forms=forms).own_key()


def test_what_another_process_measures_is_not_measured_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It chooses the forms by itself, and finds them in the cache afterwards."""
    config = train_config(
        *FAST, *shallow(1), "init.mean_attention_bits=12", "model.include=['*.attn1.to_q','*.attn2.to_k']",
        "init.candidates=[4,8]", f"calibration.cache={tmp_path}", "method=lsq",
        "profile.attention={kind:int8,rotation:auto,exclude:['*.attn2']}",
    )  # fmt: skip
    caplog.set_level("INFO")
    transformer = config.model.load_teacher()
    teacher = sampled_teacher(config, transformer, encode=config.model.encode)
    sample_share(ptq_method(config), profile=config.profile, teacher=teacher, num_processes=1)
    assert "attention: 1 videos" in caplog.text
    caplog.clear()
    student, _ = prepared(config)
    _, allocation = calibrated(config, student, teacher=transformer, encode=config.model.encode)
    assert "attention: 1 videos" not in caplog.text
    measured = [message for message in caplog.messages if message.startswith("sensitivity:")]
    assert [message.split("), ")[1].split(" of them")[0] for message in measured] == [
        message.split()[1] for message in measured
    ]
    assert len(measured) == 2
    assert allocation is not None
    assert allocation.attention == {"blocks.0.attn1": 8}
    assert "rotated in 1" in caplog.text


@pytest.mark.parametrize(
    ("kind", "mean"), [("int8", 8.5), ("int8", 11.0), ("int8", 13.0), ("int8", 15.9), ("int8_qk", 13.0)]
)
def test_the_allocation_is_the_best_of_all(measured, kind: AttentionKind, mean: float) -> None:
    """Four units of one group, which is one level; against all sixteen allocations."""
    config, *_ = measured
    names, low = [f"blocks.{index}.attn1" for index in range(4)], {"int8": 8, "int8_qk": 12}[kind]
    form = AttentionForm.of(AttentionProfile(kind=kind), heads=2, head_size=16)
    wanted = wanted_attentions(dict.fromkeys(names, form), family=config.model)
    draw = torch.Generator().manual_seed(0)
    losses = [float(torch.rand((), generator=draw)) for _ in names]
    sizes = {f"{name}.attention_product": 10 + 7 * index for index, name in enumerate(names)}
    rows = [
        Sensitivity(
            group="self_attention", block=f"blocks.{index}", side="attention", bits=low, window=0,
            output_error=loss, scores={"ssim": loss}, seconds=0.0,
        )
        for index, loss in enumerate(losses)
    ]  # fmt: skip
    found = Measured(
        rows={row.key: row for row in rows}, window_of_band=(0,), window_calls=(1,), values=sizes, metrics={}
    )
    bits = allocate_attentions(replace(config.init, mean_attention_bits=mean), wanted, found)
    total = sum(sizes.values())

    def lost(choice: tuple[int, ...]) -> float:
        return sum(loss for loss, width in zip(losses, choice, strict=True) if width == low)

    fitting = [
        choice
        for choice in product((low, 16), repeat=4)
        if sum(width * size for width, size in zip(choice, sizes.values(), strict=True)) <= mean * total
    ]
    assert tuple(bits[name] for name in names) in fitting
    assert lost(tuple(bits[name] for name in names)) == min(map(lost, fitting))


def test_a_run_packs_what_was_allocated_and_goes_on_with_it(tmp_path: Path) -> None:
    keys = (
        *FAST, *shallow(1), *UNSEEN, "init.mean_attention_bits=15", f"calibration.cache={tmp_path / 'cache'}", "steps=2",
        "method=lsq", "checkpoint.every_steps=1", "model.include=['*.attn1.to_q','*.attn2.to_k']", "init.candidates=[4,8]",
    )  # fmt: skip
    run_dir = tmp_path / "run"
    assert train(run_dir, *keys) == DONE
    allocation = read_allocation(run_dir)
    assert allocation is not None
    assert set(allocation.attention.values()) == {8, 16}
    assert 8 < allocation.mean_bits["attention"] <= 15
    assert {row.side for row in allocation.sensitivities} == {"weight", "attention"}
    report = json.loads((run_dir / "report.json").read_text())
    chosen = [name for name, bits in allocation.attention.items() if bits == 8]
    assert report["attentions_quantized"] == chosen
    assert report["mixed_precision"]["attention"] == dict(allocation.attention)
    assert (report["packed_codes_equal"], report["packed_vs_fake_max_abs"]) == (True, 0.0)
    assert "In floating point stay" in (run_dir / "report.html").read_text()
    manifest = json.loads((run_dir / "packed" / "manifest.json").read_text())
    assert [entry["name"] for entry in manifest["attentions"]] == chosen
    assert list(packed_attentions(load_packed(run_dir / "packed"))) == chosen
    again = copy_until(run_dir, tmp_path / "again", step=1)
    assert train(again, *keys, "resume=true") == DONE
    assert packed_bytes(again) == packed_bytes(run_dir)
    assert json.loads((again / "packed" / "manifest.json").read_text())["attentions"] == manifest["attentions"]


def test_a_plan_counts_the_attentions() -> None:
    config, free = (
        train_config(*FAST, *shallow(1), "init.windows=2", *keys) for keys in (("init.mean_attention_bits=12",), ())
    )
    plans = [plan_measurements(one.init, profile=one.profile, family=one.model) for one in (config, free)]
    counts = [int(plan.split()[1]) for plan in plans]
    assert counts[0] - counts[1] == 2
    assert "2 of attention in 2 blocks" in plans[0]


def test_a_budget_without_attention_in_8_bits_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["init=vidit_q_mp", "init.visual=ssim", "init.mean_attention_bits=10", f"run_dir={tmp_path / 'run'}"]
    assert main(["ptq", *words, "bits=w4a8"]) == BAD_INPUT
    (line,) = capsys.readouterr().err.splitlines()
    assert "init.mean_attention_bits=10 chooses among attentions in 8 bits, and profile.attention=none has none" in line
    assert main(["ptq", *words, "bits=w4a8", "init.mean_attention_bits=16", "profile.attention=int8"]) == BAD_INPUT
    (line,) = capsys.readouterr().err.splitlines()
    assert "init.mean_attention_bits=16" in line
    with pytest.raises(UserError, match="has none"):
        check_attention_budget(train_config(*FAST, "init.mean_attention_bits=9").init, attention=None)
    assert main(["ptq", *words, "bits=w4a8", "profile.attention=int8_qk"]) == BAD_INPUT
    (line,) = capsys.readouterr().err.splitlines()
    assert "mean_attention_bits=10 leaves nothing to choose: with profile.attention=int8_qk an attention has 12" in line
