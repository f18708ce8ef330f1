"""Callbacks and loggers that a user adds: what they see, when they can end a run, and that they change no bit of it.

The callbacks are Lightning's own classes and small real ones; sessions are trained by the function that a run trains by.
"""

from __future__ import annotations

import copy
import csv
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger, Logger
from torch import nn

from qvgen.config import TrainConfig, UserError
from qvgen.layers.swap import quantized_layers
from qvgen.training.callbacks.rules import check_monitors, check_state, first_end
from qvgen.training.callbacks.steps import metric_columns
from qvgen.training.checkpoint_writer import checkpoints
from qvgen.training.session import train_share
from qvgen.training.start.student import prepare_student
from qvgen.verbs._parts import training_output, training_run
from tests.runs import method_schedule, read_metrics, shallow, train_config

NUM_STEPS, WITHOUT_PHI = 6, 3
CONFIG = (
    f"steps={NUM_STEPS}", "batch_size=2", "phi.ranks=[2]", "phi.tail_share=0.5", "evaluation.every_steps=1",
    "evaluation.videos=0", "checkpoint.every_steps=1", "checkpoint.keep=9", *shallow(1),
)  # fmt: skip
MONITOR = "val/relative_error"


@cache
def config() -> TrainConfig:
    return train_config(*CONFIG)


def session(
    run_dir: Path,
    *callbacks: lightning.Callback,
    loggers: tuple[Logger, ...] = (),
    validate: Callable[[nn.Module], float] = lambda student: 1.0,
    **changes: Any,
) -> tuple[int, nn.Module]:
    """Train from the newest checkpoint; the step it ended with, and the student."""
    asked = replace(config(), callbacks=callbacks, **changes)
    run = training_run(asked)
    student, _ = prepare_student(asked.model, run.design, seed=asked.seed)
    run_dir.mkdir(exist_ok=True)
    output = training_output(asked, run_dir, validate=validate, loggers=loggers)
    return train_share(run, output, student=student, teacher=asked.model.load_teacher()), student


def state_of(student: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in student.state_dict().items()}


def early(patience: int = 1, **further: Any) -> EarlyStopping:
    return EarlyStopping(monitor=MONITOR, patience=patience, **further)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """A session without anything added."""
    run_dir = tmp_path_factory.mktemp("plain") / "run"
    return run_dir, state_of(session(run_dir)[1])


class Watcher(lightning.Callback):
    """Notes what it can see after each step, and logs a number of its own."""

    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []
        self.measured: list[int] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx % 2:
            self.seen.append({name: float(value) for name, value in trainer.callback_metrics.items()})
        pl_module.log("mine/number", 7.0)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self.measured.append(trainer.global_step)


class Broken(CSVLogger):
    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        raise OSError("the service is away")


def test_what_looks_at_a_run_sees_its_numbers_and_changes_no_bit(
    plain: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    watcher, table = Watcher(), CSVLogger(tmp_path, name="table", version="one")
    options = replace(config().trainer, log_every_n_steps=1)
    _, student = session(
        tmp_path / "run", watcher, LearningRateMonitor(), early(patience=9), trainer=options,
        loggers=(Broken(tmp_path, name="broken"), table),
    )  # fmt: skip
    assert all(torch.equal(value, plain[1][name]) for name, value in student.state_dict().items())
    rows = read_metrics(tmp_path / "run")
    assert rows == read_metrics(plain[0])
    assert watcher.measured == list(range(1, NUM_STEPS + 1))
    assert [round(seen["train/loss"], 6) for seen in watcher.seen] == [
        round(float(row["train/loss"]), 6) for row in rows
    ]
    assert [seen["phi/rank"] for seen in watcher.seen] == [2, 2, 2, 0, 0, 0]
    with (tmp_path / "table" / "one" / "metrics.csv").open(encoding="utf-8", newline="") as file:
        logged = list(csv.DictReader(file))
    assert {"mine/number", "lr-AdamW/weights", "train/loss", MONITOR} <= logged[0].keys()
    losses = {row["step"]: row["train/loss"] for row in logged if row["train/loss"]}
    assert losses == {row["step"]: row["train/loss"] for row in rows}
    (warning,) = [record.message for record in caplog.records if "failed" in record.message]
    assert warning == "Broken failed, training goes on without it (OSError: the service is away)"


def test_loggers_get_every_so_many_steps_and_each_measurement(tmp_path: Path) -> None:
    table = CSVLogger(tmp_path, name="table", version="one")
    options, measured = replace(config().trainer, log_every_n_steps=2), replace(config().evaluation, every_steps=5)
    session(tmp_path / "run", loggers=(table,), trainer=options, evaluation=measured)
    with (tmp_path / "table" / "one" / "metrics.csv").open(encoding="utf-8", newline="") as file:
        logged = list(csv.DictReader(file))
    assert [(row["step"], bool(row[MONITOR])) for row in logged] == [
        ("1", False), ("3", False), ("4", True), ("5", True),
    ]  # fmt: skip
    assert len(read_metrics(tmp_path / "run")) == NUM_STEPS


def test_a_run_can_end_once_phi_is_gone_and_stays_at_its_end(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The error never falls, so a patience of 1 asks to end it from the second measurement on."""
    step, student = session(tmp_path / "run", early())
    assert step == WITHOUT_PHI
    assert all(layer.phi is None or layer.phi.rank == 0 for layer in quantized_layers(student).values())
    assert [path.stem for path in checkpoints(tmp_path / "run" / "checkpoints")][-1] == f"step-{WITHOUT_PHI:08d}"
    assert len(read_metrics(tmp_path / "run")) == WITHOUT_PHI
    (warning,) = [record.message for record in caplog.records if "asked to end" in record.message]
    assert warning.startswith("step 2: a callback asked to end the training; it goes on: before step 3")
    again, resumed = session(tmp_path / "run", early())
    assert again == WITHOUT_PHI
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in student.state_dict().items())
    assert len(read_metrics(tmp_path / "run")) == WITHOUT_PHI


def test_a_resumed_run_ends_where_the_uninterrupted_one_does(tmp_path: Path) -> None:
    """With a patience of 2 the measurements 1, 2 and 3 end it; a callback that began anew would need two more."""
    step, student = session(tmp_path / "run", early(patience=2))
    assert step == 3
    for path in checkpoints(tmp_path / "run" / "checkpoints")[2:]:
        path.unlink()
    again, resumed = session(tmp_path / "run", early(patience=2))
    assert again == 3
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in student.state_dict().items())


class AskBetween(lightning.Callback):
    """Asks to end the run in the first micro-batch of a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step and batch_idx == 2 * self.step:
            trainer.should_stop = True


def test_a_run_ends_behind_a_whole_step_and_measures_it(tmp_path: Path) -> None:
    rarely = replace(config().evaluation, every_steps=50)
    slow = replace(config().checkpoint, every_steps=50)
    step, _ = session(tmp_path / "run", AskBetween(3), evaluation=rarely, checkpoint=slow)
    assert step == 4
    rows = read_metrics(tmp_path / "run")
    assert [bool(row[MONITOR]) for row in rows] == [False, False, False, True]
    assert [path.stem for path in checkpoints(tmp_path / "run" / "checkpoints")] == ["step-00000004"]
    options = replace(config().trainer, min_steps=5)
    assert session(tmp_path / "later", AskBetween(3), trainer=options, evaluation=rarely)[0] == NUM_STEPS


def test_when_a_run_can_end() -> None:
    schedule = method_schedule(config())
    assert first_end(schedule, num_steps=NUM_STEPS, min_steps=None) == WITHOUT_PHI
    assert first_end(schedule, num_steps=NUM_STEPS, min_steps=5) == 5
    assert first_end(None, num_steps=NUM_STEPS, min_steps=None) == 0
    no_tail = method_schedule(train_config(f"steps={NUM_STEPS}", "phi.ranks=[2]", "phi.tail_share=0"))
    assert first_end(no_tail, num_steps=NUM_STEPS, min_steps=None) == NUM_STEPS


def test_a_callback_that_waits_for_what_the_run_has_not_is_refused() -> None:
    columns = metric_columns(method_schedule(config()))[1:]
    check_monitors([early(), LearningRateMonitor()], columns=columns, is_measured=True)
    with pytest.raises(UserError, match=r"has none before its end; write for example evaluation\.every_steps=100"):
        check_monitors([early()], columns=columns, is_measured=False)
    check_monitors([LearningRateMonitor()], columns=columns, is_measured=False)
    wrong = EarlyStopping(monitor="val/relative_eror")
    with pytest.raises(UserError, match="which the run does not log; did you mean 'val/relative_error'"):
        check_monitors([wrong], columns=columns, is_measured=True)
    check_monitors([wrong, Watcher()], columns=columns, is_measured=True)  # which may log it


class Odd(lightning.Callback):
    def state_dict(self) -> dict[str, Any]:
        return {"path": copy.copy, "number": 3}


def test_a_state_that_could_not_be_read_again_is_refused_before_the_first_step(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"Odd.state_dict\(\) holds what can't be read again without running code"):
        session(tmp_path / "run", Odd())
    assert not list((tmp_path / "run").rglob("*.ckpt"))
    check_state("early", early().state_dict())


def test_what_lightning_finds_wrong_with_a_callback_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Cannot use `LearningRateMonitor` callback with `Trainer` that has no logger"):
        session(tmp_path / "run", LearningRateMonitor())
