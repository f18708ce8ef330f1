"""Callbacks between optimizer steps: checked against the schedule, a dense SVD, and tables written by hand."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from qvgen.layers.swap import quantized_layers
from qvgen.methods.parameter_group import parameter_groups
from qvgen.methods.phi_decay import PhiDecay
from qvgen.training.callbacks.steps import begin_table, total_seconds
from qvgen.training.checkpoint_writer import AtomicCheckpointIO, checkpoints
from qvgen.training.optim.optimizer import build_optimizer
from tests.parts import prepared
from tests.runs import BOUNDARIES, STEPS, method_schedule, read_metrics, train_config

RANKS = (4, 2, 1)


@pytest.fixture
def trained() -> tuple[nn.Module, torch.optim.Optimizer, PhiDecay]:
    """A student with moments everywhere, as it is after the last step before the first boundary."""
    config = train_config()
    schedule = method_schedule(config)
    assert schedule is not None
    student, _ = prepared(config)
    optimizer, _ = build_optimizer(parameter_groups(student, config.optim), config.optim, num_steps=STEPS)
    generator = torch.Generator().manual_seed(0)
    for step in range(BOUNDARIES[0]):
        schedule.apply_(student, optimizer, step=step)
        for parameter in student.parameters():
            parameter.grad = 1e-3 * torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    return student, optimizer, schedule


def state(student: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in student.state_dict().items()}


def test_the_plan_of_a_short_run_has_the_boundaries_that_the_tests_use() -> None:
    schedule = method_schedule(train_config())
    assert schedule is not None
    assert (tuple(schedule.decay.ranks), schedule.decay.boundaries[1:]) == (RANKS, BOUNDARIES)


def test_applying_a_step_again_changes_nothing(
    trained: tuple[nn.Module, torch.optim.Optimizer, PhiDecay],
) -> None:
    student, optimizer, schedule = trained
    for step in (BOUNDARIES[0] - 1, BOUNDARIES[0], BOUNDARIES[1], BOUNDARIES[2]):
        schedule.apply_(student, optimizer, step=step)
        once = state(student)
        schedule.apply_(student, optimizer, step=step)
        assert all(torch.equal(value, once[name]) for name, value in student.state_dict().items())


def test_a_boundary_drops_moments_of_phi_alone_and_keeps_the_weight(
    trained: tuple[nn.Module, torch.optim.Optimizer, PhiDecay],
) -> None:
    student, optimizer, schedule = trained
    layers = quantized_layers(student)
    before = {name: layer.effective_weight() for name, layer in layers.items()}
    storage = {name: value.data_ptr() for name, value in student.named_parameters()}
    moments = {id(parameter): state["exp_avg"].clone() for parameter, state in optimizer.state.items()}
    for layer in layers.values():
        assert layer.phi is not None
        assert not layer.phi.rank_gate[RANKS[1] :].any()  # exactly 0 before the columns go
    schedule.apply_(student, optimizer, step=BOUNDARIES[0])
    for name, layer in layers.items():
        change = (layer.effective_weight() - before[name]).norm() / before[name].norm()
        assert change <= 1e-6
        assert layer.phi.rank == RANKS[1]
        assert not layer.phi.left[:, RANKS[1] :].any()
        assert not layer.phi.right[RANKS[1] :].any()
    assert storage == {name: value.data_ptr() for name, value in student.named_parameters()}
    for name, parameter in student.named_parameters():
        if ".phi." in name:
            assert not any(value.any() for value in optimizer.state[parameter].values()), name
        else:
            assert torch.equal(optimizer.state[parameter]["exp_avg"], moments[id(parameter)]), name


def test_no_moments_are_dropped_inside_of_a_phase(
    trained: tuple[nn.Module, torch.optim.Optimizer, PhiDecay],
) -> None:
    student, optimizer, schedule = trained
    schedule.apply_(student, optimizer, step=BOUNDARIES[0] - 1)
    assert all(state["exp_avg"].any() for state in optimizer.state.values())


def test_a_run_writes_one_row_per_step_with_the_plan_of_phi(short_run: Path) -> None:
    rows = read_metrics(short_run)
    schedule = method_schedule(train_config())
    assert schedule is not None
    assert [int(row["step"]) for row in rows] == list(range(STEPS))
    for step, row in enumerate(rows):
        planned = schedule.decay.at(step)
        assert int(row["phi/rank"]) == planned.rank
        assert float(row["phi/gamma_min"]) == min(planned.gate, default=0.0)
        assert float(row["train/loss"]) > 0
        assert float(row["train/gradient_norm"]) > 0
        assert row["val/relative_error"] == ""
    names = ("system/step_seconds", "system/clips_per_second", "system/tokens_per_second", "system/mfu")
    with (short_run / "metrics.csv").open(encoding="utf-8", newline="") as file:
        figures = [[row[name] for name in names] for row in csv.DictReader(file)]
    tokens = math.prod(a // b for a, b in zip(train_config().model.sample_shape[1:], (1, 4, 4), strict=True))
    for seconds, clips, per_second, mfu in figures:
        assert float(clips) == train_config().batch_size / float(seconds)
        assert float(per_second) == pytest.approx(tokens * float(clips))
        assert mfu == ""  # of a CPU no peak is known
    rates = [float(row["train/learning_rate"]) for row in rows]
    peak = train_config().optim.learning_rate
    assert rates[0] == peak  # the step's own rate: one step of warm-up ends at the peak
    assert rates[-1] > 0


COLUMNS = (
    "step", "train/loss", "train/gradient_norm", "train/learning_rate", "train/seconds", "phi/rank", "phi/gamma_min",
    "val/relative_error",
)  # fmt: skip


def write_table(path: Path, lines: list[str]) -> None:
    path.write_text(",".join(COLUMNS) + "\n" + "".join(lines), encoding="utf-8")


def steps_kept(path: Path, *, step: int) -> list[str]:
    begin_table(path, COLUMNS, step=step)
    return [line.split(",")[0] for line in path.read_text(encoding="utf-8").splitlines()[1:]]


def test_rows_from_the_resumed_step_on_and_half_a_row_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    full = [f"{step},0.5,0.1,0.002,{step + 0.25},4,1.0,\n" for step in range(4)]
    write_table(path, full)
    assert total_seconds(path) == 3.25
    assert steps_kept(path, step=9) == ["0", "1", "2", "3"]
    assert steps_kept(path, step=2) == ["0", "1"]
    assert begin_table(path, COLUMNS, step=2) == 1.25
    for cut in ("4", "4,0.5,0.", ",", "4,0.5,0.1,0.002,7.25,4,1.0"):
        write_table(path, [*full, cut])
        assert steps_kept(path, step=9) == ["0", "1", "2", "3"], cut
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.csv"]
    assert begin_table(tmp_path / "none.csv", COLUMNS, step=3) == 0.0
    assert total_seconds(tmp_path / "none.csv") == 0.0


def test_a_damaged_table_is_kept_beside_the_one_that_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    for number, content in enumerate((b"step,note\n0,caf\xe9\n", "step\n".encode("utf-16")), start=1):
        path.write_bytes(content)
        assert steps_kept(path, step=9) == []
        assert (tmp_path / f"metrics.csv.damaged-{number}").read_bytes() == content
    path.write_bytes(b"step,train/loss,something\n0,0.5,7\n")
    assert steps_kept(path, step=9) == ["0"]
    assert path.read_text().splitlines()[1] == "0,0.5,,,,,,"


def test_a_checkpoint_file_is_whole_or_not_there(tmp_path: Path) -> None:
    path = tmp_path / "checkpoints" / "step-00000001.ckpt"
    AtomicCheckpointIO().save_checkpoint({"a": torch.arange(3), "plain": {"b": [1, "c"]}}, path)
    loaded = AtomicCheckpointIO().load_checkpoint(path)
    assert torch.equal(loaded["a"], torch.arange(3))
    assert loaded["plain"] == {"b": [1, "c"]}
    before = path.read_bytes()

    class Unpicklable:
        def __reduce__(self) -> Any:
            raise TypeError("cannot be pickled")

    with pytest.raises(TypeError):
        AtomicCheckpointIO().save_checkpoint({"a": torch.arange(9), "b": Unpicklable()}, path)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]
    AtomicCheckpointIO().remove_checkpoint(path)
    AtomicCheckpointIO().remove_checkpoint(path)
    assert checkpoints(path.parent) == []


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path: Path) -> None:
    class Harmful:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "executed",))

    path = tmp_path / "step-00000001.ckpt"
    torch.save({"state_dict": {}, "harm": Harmful()}, path)
    with pytest.raises(ValueError, match=r"step-00000001.ckpt is no checkpoint or damaged"):
        AtomicCheckpointIO().load_checkpoint(path, weights_only=False)
    assert not (tmp_path / "executed").exists()


def test_checkpoints_are_listed_by_step(tmp_path: Path) -> None:
    for step in (100, 9, 50):
        (tmp_path / f"step-{step:08d}.ckpt").touch()
    (tmp_path / "other.ckpt").touch()
    assert [path.name[5:13] for path in checkpoints(tmp_path)] == ["00000009", "00000050", "00000100"]
