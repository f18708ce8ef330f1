"""A training method that nothing in qvgen knows: its loss, what it adds to the student, its groups and its schedule are used.

Checked against what the method itself wrote down, and against the same run continued after a kill.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from qvgen.config.schema.sections import OptimConfig, PhiConfig
from qvgen.deploy.checkpoint import load_packed
from qvgen.methods.base import Method
from qvgen.verbs._quantize import quantize
from tests.parts import training_module
from tests.runs import UNSEEN, copy_until, packed_bytes, read_metrics, train_config

RATE = 0.01


class Offset(nn.Module):
    """A learned offset of a layer's output, times a strength that the schedule sets."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.zeros(size))
        self.register_buffer("strength", torch.ones(()))

    def add(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        del module, inputs
        return output + self.strength * self.value


@dataclass(frozen=True)
class Strengthen:
    """Strength 0.5 in the first half, 1 in the second."""

    columns: ClassVar[tuple[str, ...]] = ("offset/strength",)
    phases: ClassVar[tuple[tuple[int, int], ...]] = ()
    num_steps: int

    def apply_(self, student: nn.Module, optimizer: torch.optim.Optimizer | None, *, step: int) -> None:
        del optimizer
        student.offset.strength.fill_(self._strength(step))

    def metrics(self, step: int) -> Mapping[str, float | int]:
        return {"offset/strength": self._strength(step)}

    def _strength(self, step: int) -> float:
        return 0.5 if step < self.num_steps // 2 else 1.0


@dataclass(frozen=True, kw_only=True)
class OffsetTraining(Method):
    """L1 distillation with an offset that ends in the last bias."""

    @property
    def needs_teacher(self) -> bool:
        return True

    def prepare_(self, student: nn.Module) -> None:
        student.offset = Offset(student.proj_out.bias.numel())
        student.offset_hook = student.proj_out.register_forward_hook(student.offset.add)

    def finish_(self, student: nn.Module) -> None:
        with torch.no_grad():
            student.proj_out.bias += student.offset.strength * student.offset.value
        student.offset_hook.remove()
        del student.offset, student.offset_hook

    def loss(self, prediction: Tensor, *, teacher: Tensor | None, target: Tensor, timestep: Tensor) -> Tensor:
        assert teacher is not None
        assert timestep.shape == target.shape[:1]
        return (prediction.float() - teacher.float()).abs().mean()

    def parameter_groups(self, model: nn.Module, optim: OptimConfig) -> list[dict[str, Any]]:
        offset = [parameter for name, parameter in model.named_parameters() if name.startswith("offset.")]
        return [{"name": "offset", "params": offset, "lr": RATE, "weight_decay": 0.0}]

    def schedule(self, phi: PhiConfig, *, num_steps: int) -> Strengthen:
        del phi
        return Strengthen(num_steps)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("own") / "run"
    quantize(configured(folder))
    return folder


def configured(run_dir: Path, *overrides: str) -> Any:
    config = train_config(f"run_dir={run_dir}", "checkpoint.every_steps=3", "checkpoint.keep=9", *UNSEEN, *overrides)
    return replace(config, method=OffsetTraining())


def test_everything_of_the_method_is_used(run_dir: Path) -> None:
    rows = read_metrics(run_dir)
    assert [float(row["offset/strength"]) for row in rows] == [0.5] * 6 + [1.0] * 6
    assert {row["phi/rank"] for row in rows} == {""}
    assert float(rows[0]["train/learning_rate"]) == RATE
    checkpoint = torch.load(run_dir / "checkpoints" / "step-00000012.ckpt", weights_only=True)["state_dict"]
    offset = checkpoint["student.offset.value"]
    assert offset.abs().max() > RATE / 2  # twelve steps of Adam
    start, packed = checkpoint["student.proj_out.bias"], load_packed(run_dir / "packed").proj_out.bias
    assert torch.equal(packed, start + offset)  # nothing else was trained


def test_what_was_trained_is_what_is_packed(run_dir: Path) -> None:
    report = json.loads((run_dir / "report.json").read_text())
    assert report["packed_codes_equal"] is True
    assert report["packed_vs_fake_max_abs"] == 0.0
    assert report["relative_error"]["qat"] < report["relative_error"]["ptq"]


def test_it_goes_on_after_a_kill_to_the_same_bytes(run_dir: Path, tmp_path: Path) -> None:
    again = copy_until(run_dir, tmp_path / "run", step=9)
    quantize(replace(configured(again), resume=True))
    assert packed_bytes(again) == packed_bytes(run_dir)
    assert read_metrics(again) == read_metrics(run_dir)


def test_a_teacher_is_passed_exactly_where_it_is_needed() -> None:

    config = configured(Path("unused"))
    student = config.model.load_teacher()
    with pytest.raises(ValueError, match="OffsetTraining.needs_teacher=True and a teacher is missing"):
        training_module(config, student=student, teacher=None, encode=config.model.encode)


def test_caption_dropout_is_a_probability() -> None:
    with pytest.raises(ValueError, match="caption_dropout=1.5 is outside"):
        OffsetTraining(caption_dropout=1.5)
