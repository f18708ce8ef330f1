"""The parts of a run, called from Python without a run's configuration, against what the same command line makes of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import qvgen
from qvgen.config.bits import Bits
from qvgen.config.defaults import SECTIONS, load_section
from qvgen.config.leaves import load_leaf, load_profile
from qvgen.errors import UserError
from qvgen.evaluation.sampled_teacher import SampledTeacher
from qvgen.layers.swap import packed_layers, quantized_layers
from qvgen.models.named_family import NamedFamily
from qvgen.training.design.micro_batch import StepBatch
from qvgen.training.design.student import StudentDesign
from qvgen.training.design.training_run import TrainingOutput, TrainingRun
from qvgen.training.design.training_steps import TrainingSteps
from qvgen.training.planning.training_plan import plan_training
from qvgen.training.session import train_share
from qvgen.training.start.ptq_method import PTQMethod
from qvgen.training.start.run_calibration import calibrate_
from qvgen.training.start.student import fold_student, prepare_student, set_up_student_
from qvgen.training.start.student_check import check_student
from tests.parts import calibrated_model, planned, prepared
from tests.runs import train_config

MODEL = {"num_inference_steps": 2}
KEYS = ("bits=w4a8", "steps=20", "phi.rank=4", "model.num_inference_steps=2")
PAGE = Path(__file__).resolve().parents[2] / "docs" / "python.md"


def design_of(method: str = "qvgen", **changes: Any) -> StudentDesign:
    return StudentDesign(
        profile=load_profile("paper", Bits.parse("w4a8")),
        method=load_leaf("method", method),
        phi=load_section("phi", rank=4),
        **changes,
    )


def teacher_of(model: NamedFamily) -> SampledTeacher:
    family = model.family
    return SampledTeacher(model=model, transformer=family.load_teacher(), encode=family.encode, seed=42)


def same(found: nn.Module, wanted: nn.Module) -> bool:
    mine, others = found.state_dict(), wanted.state_dict()
    return list(mine) == list(others) and all(torch.equal(mine[name], others[name]) for name in mine)


def test_a_student_is_that_of_the_command_line() -> None:
    model = NamedFamily.load("tiny", **MODEL)
    student, report = prepare_student(model.family, design_of(), seed=42)
    wanted, wanted_report = prepared(train_config(*KEYS))
    assert report == wanted_report
    assert same(student, wanted)
    assert next(iter(quantized_layers(student).values())).phi is not None
    without, _ = prepare_student(model.family, design_of("lsq"), seed=42)
    assert next(iter(quantized_layers(without).values())).phi is None


def test_a_student_is_calibrated_set_up_folded_and_loaded(tmp_path: Path) -> None:
    model, design = NamedFamily.load("tiny", **MODEL), design_of("lsq")
    teacher, cache = teacher_of(model), str(tmp_path / "cache")
    calibration = load_section("calibration", videos=1, steps=2, cache=cache)
    ptq = PTQMethod(name="smoothquant", init=load_leaf("init", "smoothquant"), calibration=calibration)
    student, _ = prepare_student(model.family, design, seed=42)
    statistics, allocation = calibrate_(student, ptq, profile=design.profile, teacher=teacher)
    assert allocation is None
    assert statistics is not None

    config = train_config(
        *KEYS, "init=smoothquant", "calibration.videos=1", "calibration.steps=2", f"calibration.cache={tmp_path / 'other'}"
    )  # fmt: skip
    wanted = calibrated_model(config, teacher=teacher.transformer, encode=teacher.encode)
    assert statistics.key == wanted.key  # so that a command reads what a notebook has sampled, and the other way round
    for name in ("proj_out", "blocks.1.ffn.net.2"):
        assert torch.equal(statistics(name).abs_max, wanted(name).abs_max)

    assert set_up_student_(student, design=design, ptq=ptq, teacher=teacher) is None
    fold_student(student, tmp_path / "packed", model=model, training={"method": "none"})
    packed = qvgen.load_packed(tmp_path / "packed", kernel="reference")
    assert len(packed_layers(packed)) == 36
    x = torch.randn(1, *model.family.sample_shape, generator=torch.Generator().manual_seed(0))
    condition = model.family.encode(["a red three moving up left"])
    with torch.no_grad():
        outputs = [model.family.predict(each, x, torch.tensor([500.0]), condition) for each in (student.eval(), packed)]
    assert torch.equal(*outputs)


def test_a_plan_is_that_of_the_command_line(tmp_path: Path) -> None:
    steps = TrainingSteps(
        num_steps=20, batch=StepBatch(size=4), optim=load_section("optim", learning_rate=2e-3), seed=42
    )
    run = TrainingRun(
        model=NamedFamily.load("tiny", num_layers=1, **MODEL),
        design=design_of(),
        steps=steps,
        strategy=load_section("strategy"),
    )
    plan = plan_training(run, device_memory_gib=80, run_dir=tmp_path)
    wanted = planned(train_config(*KEYS, "model.num_layers=1", "device_memory_gib=80", f"run_dir={tmp_path}"))
    now = {"host_available_bytes": 0, "disk_available_bytes": 0}  # what else runs on this machine
    assert replace(plan, **now) == replace(wanted, **now)
    assert plan.schedule.micro_batch == 2
    assert [rank for rank, _ in plan.schedule.phases] == [4, 2, 1, 0]
    shared = replace(
        run,
        strategy=load_section("strategy", name="fsdp"),
        steps=replace(steps, batch=StepBatch(size=4, devices=2)),
    )
    assert (run.shards, shared.shards) == (1, 2)


def test_what_does_not_fit_is_said_in_seconds() -> None:
    family = NamedFamily.load("tiny").family
    ptq = PTQMethod(name="static", init=load_leaf("init", "static"), calibration=load_section("calibration"))
    assert check_student(family, design_of(), ptq, num_steps=20) is not None
    switch = load_section("activation_switch", widths=[4, 8])
    with pytest.raises(ValueError, match="init=static has one table of scales"):
        check_student(family, design_of(activation_switch=switch), ptq, num_steps=20)
    with pytest.raises(ValueError, match="phi"):
        check_student(family, design_of(), ptq, num_steps=1)
    with pytest.raises(ValueError, match="a batch of 5 can't be divided by 2 devices x 2 micro-batches"):
        StepBatch(size=5, accumulate=2, devices=2)


def test_a_training_without_data_is_refused(tmp_path: Path) -> None:
    steps = TrainingSteps(num_steps=1, batch=StepBatch(size=2), optim=load_section("optim", learning_rate=1e-3), seed=1)
    model = NamedFamily.load("tiny")
    run = TrainingRun(model=model, design=design_of("lsq"), steps=steps, strategy=load_section("strategy"))
    output = TrainingOutput(
        run_dir=tmp_path,
        checkpoint=load_section("checkpoint"),
        evaluation=load_section("evaluation"),
        trainer=load_section("trainer"),
    )
    with pytest.raises(ValueError, match="a training needs data; give TrainingRun"):
        train_share(run, output, student=nn.Linear(1, 1), teacher=None)


def test_sections_have_the_defaults_of_the_command_line() -> None:
    config = train_config()  # of a few steps: `phi.rank` and numbers of the evaluation are given there
    for name in SECTIONS:
        settled = {"strategy": {"name": "single"}}  # a command's auto, of one process
        given = {"optim": {"learning_rate": 2e-3}, "phi": {"rank": 4}, **settled}.get(name, {})
        if name != "evaluation":
            assert load_section(name, **given) == getattr(config, name), name
    assert load_section("evaluation", samples=7).quality_videos == 7
    for call, message in (
        (lambda: load_section("phy"), "unknown section 'phy'; did you mean 'phi'"),
        (lambda: load_section("phi", rnk=4), "unknown key 'phi.rnk'"),
        (lambda: load_section("phi", rank=0), "phi.rank=0 must be greater than 0"),
        (lambda: load_section("optim"), "optim.learning_rate has no default without a model's recipe"),
    ):
        with pytest.raises(UserError, match=message):
            call()


def test_a_family_knows_what_it_was_made_of() -> None:
    model = NamedFamily.load("tiny", num_frames=4)
    assert model.section == train_config("model.num_frames=4", "model.num_inference_steps=20").plain["model"]
    assert model.rebuild() is not model.family
    assert model.rebuild({"image_size": 8}).sample_shape == (3, 4, 8, 8)
    with pytest.raises(UserError, match="unknown key 'model.frames'"):
        NamedFamily.load("tiny", frames=4)


def test_the_pages_example_of_the_parts_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, code = PAGE.read_text(encoding="utf-8").split("```python\n")[1:]
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(code.split("```")[0], "docs/python.md", "exec"), names)
    shown = capsys.readouterr().out
    assert "plan of a run of the tiny model" in shown
    assert "\nfits: " in shown
    assert names["row"].output_error > 0
    assert (names["row"].side, names["row"].bits, names["row"].group) == ("weight", 4, "ffn")
    assert list((tmp_path / "statistics").glob("sensitivity-*.jsonl"))
