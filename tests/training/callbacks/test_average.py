"""The moving average of a student: its formula in float64, what begins it again, and runs that measure and fold it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from qvgen.cli import DONE, main
from qvgen.config.defaults import load_section
from qvgen.training.callbacks.average import Average, kept_share
from tests.runs import UNSEEN, copy_until, load_checkpoint, packed_bytes, read_metrics, shallow, train


def test_it_is_the_formula_and_begins_again_with_each_phase() -> None:
    student, begins, decay = nn.Linear(3, 2), (0, 4), 0.3
    frozen = nn.Parameter(torch.ones(2), requires_grad=False)
    student.frozen = frozen
    average = Average(load_section("ema", decay=decay), begins=begins)
    average.begin(student)
    assert set(average.tensors) == {"weight", "bias"}
    wanted = student.weight.detach().double()
    generator = torch.Generator().manual_seed(0)
    for step in range(9):
        with torch.no_grad():
            student.weight.copy_(torch.randn(2, 3, generator=generator))
        number = step if step < 4 else step - 4
        kept = 0.0 if number == 0 else min(decay, (1 + number) / (10 + number))
        wanted = kept * wanted + (1 - kept) * student.weight.detach().double()
        average.take_in(student, step=step)
        torch.testing.assert_close(average.tensors["weight"].double(), wanted, rtol=1e-6, atol=1e-7)  # float32
        if number == 0:
            assert torch.equal(average.tensors["weight"], student.weight)
    assert kept_share(10**6, decay=0.999) == 0.999


def test_the_student_is_itself_again_after_it_was_shown() -> None:
    student = nn.Linear(3, 2).bfloat16()
    average = Average(load_section("ema", decay=0.5, host=True), begins=[])
    average.begin(student)
    assert average.tensors["weight"].dtype == torch.float32
    with torch.no_grad():
        student.weight.add_(1.0)
    before = student.weight.clone()
    with average.shown(student):
        assert torch.equal(student.weight, average.tensors["weight"].bfloat16())
        assert not torch.equal(student.weight, before)
    assert torch.equal(student.weight, before)


OPTIONS = (
    *shallow(1), *UNSEEN, "steps=6", "phi.ranks=[4,2]", "phi.tail_share=0.3", "checkpoint.every_steps=3",
    "checkpoint.keep=9", "evaluation.every_steps=2", "evaluation.samples=2", "ema.decay=0.5",
)  # fmt: skip
TWO = ("accumulate=2",)
"""One process that adds two parts has the bits of two processes with one."""


@pytest.fixture(scope="module")
def averaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("average") / "run"
    assert train(folder, *OPTIONS, *TWO) == DONE
    return folder


def test_a_run_measures_and_folds_its_average_and_goes_on_to_the_same_bytes(averaged: Path, tmp_path: Path) -> None:
    """Training itself is that of a run without one; a kill in the middle changes nothing."""
    plain = tmp_path / "plain"
    assert train(plain, *OPTIONS, *TWO, "ema.decay=null") == DONE
    rows, others = read_metrics(averaged), read_metrics(plain)
    assert [row["train/loss"] for row in rows] == [row["train/loss"] for row in others]
    assert packed_bytes(averaged) != packed_bytes(plain)
    errors = [[row["val/relative_error"] for row in table] for table in (rows, others)]
    assert errors[0][1] != errors[1][1]
    report = json.loads((averaged / "report.json").read_text())
    assert report["relative_error"]["qat"] == float(errors[0][-1])
    assert report["packed_codes_equal"] is True

    again = copy_until(averaged, tmp_path / "again", step=3)
    assert train(again, *OPTIONS, *TWO, "resume=true") == DONE
    assert packed_bytes(again) == packed_bytes(averaged)
    assert read_metrics(again) == rows
    out = tmp_path / "folded"
    assert main(["fold", f"run_dir={averaged}", f"out={out}"]) == DONE
    assert (out / "model.safetensors").read_bytes() == packed_bytes(averaged)


def test_shares_are_averaged_like_a_whole_student(averaged: Path, tmp_path: Path) -> None:
    options = (*OPTIONS, "devices=2", "strategy=fsdp")
    two = tmp_path / "two"
    assert train(two, *options) == DONE
    assert packed_bytes(two) == packed_bytes(averaged)
    assert read_metrics(two) == read_metrics(averaged)
    states = [load_checkpoint(run / "checkpoints" / "step-00000003.ckpt")["average"] for run in (averaged, two)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    again = copy_until(two, tmp_path / "again", step=3)
    assert train(again, *options, "resume=true") == DONE
    assert packed_bytes(again) == packed_bytes(two)
