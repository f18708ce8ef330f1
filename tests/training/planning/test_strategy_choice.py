"""``strategy=auto`` against the bytes that the plan counts for each strategy, on devices that hold just so much."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from qvgen.cli import DONE, main
from qvgen.training.design.meta_model import build_student
from qvgen.training.design.training_run import TrainingRun
from qvgen.training.planning.memory import USABLE_SHARE, Device, MemoryCounter
from qvgen.training.planning.strategy_choice import StrategyChoice, choose_strategy
from qvgen.training.planning.training_plan import plan_training, step_settings
from qvgen.verbs._parts import training_run
from tests.runs import train_config

SMALL = ("batch_size=8", "strategy=auto", "model.num_layers=2", "phi.rank=2")


def card(nbytes: float) -> Device:
    """A device whose tensors may fill so many bytes."""
    return Device(name="a card", nbytes=int(nbytes / USABLE_SHARE) + 1, on_gpu=True, is_here=False)


def run_of(*words: str) -> TrainingRun:
    return training_run(train_config(*SMALL, *words))


@pytest.fixture(scope="module")
def sizes() -> dict[int, int]:
    """Shards -> bytes on each device, of micro-batches of one sample."""
    run = run_of("devices=4", "accumulate=2")
    counter, settings = (
        MemoryCounter(run, build_student(run.model.rebuild(), run.design)[0]),
        step_settings(run, card(1)),
    )
    return {shards: counter.total(settings, shards=shards) for shards in (1, 2, 4)}


@pytest.mark.parametrize(
    ("words", "shards", "less", "name"),
    [
        (["devices=4", "accumulate=2"], 1, 0, "ddp"),
        (["devices=4", "accumulate=2"], 4, 0, "fsdp"),
        (["devices=2", "num_nodes=2", "accumulate=2"], 2, 0, "hsdp"),
        (["devices=2", "num_nodes=2", "accumulate=2"], 2, 1, "fsdp"),
    ],
)
def test_the_first_that_fits_is_chosen(
    sizes: dict[int, int], words: list[str], shards: int, less: int, name: str
) -> None:
    assert sizes[1] > sizes[2] > sizes[4]
    run = run_of(*words)
    device = card(sizes[shards] - 100 * less)
    choice = choose_strategy(run, device)
    assert (choice.strategy.name, choice.fits) == (name, True)
    assert choice.line.startswith(f"strategy=auto: {name}, ")
    assert ("ddp needs" in choice.line) == (name != "ddp")
    settled = replace(run, strategy=choice.strategy)
    plan = plan_training(settled, device_memory_gib=device.nbytes / 2**30, counter=choice.counter)
    assert plan.fits
    assert plan.memory_bytes == sizes[{"ddp": 1, "hsdp": 2, "fsdp": 4}[name]]


def test_where_nothing_fits_the_smallest_is_named(sizes: dict[int, int]) -> None:
    choice = choose_strategy(run_of("devices=4", "accumulate=2"), card(sizes[4] - 100))
    assert (choice.strategy.name, choice.fits) == ("fsdp", False)
    assert "nothing fits, fsdp needs" in choice.line


def test_options_that_forbid_shares_leave_ddp(sizes: dict[int, int]) -> None:
    choice = choose_strategy(run_of("devices=4", "strategy.teacher_offload=true"), card(sizes[4]))
    assert (choice.strategy.name, choice.fits) == ("ddp", False)
    assert "the teacher is shared out already" in choice.line


@pytest.mark.parametrize(("words", "name"), [([], "single"), (["devices=2"], "ddp")])
def test_a_cpu_is_not_counted(words: list[str], name: str) -> None:
    cpu = Device(name="the CPU", nbytes=1, on_gpu=False, is_here=True)
    choice: StrategyChoice = choose_strategy(run_of(*words), cpu)
    assert (choice.strategy.name, choice.fits, choice.counter) == (name, True, None)


def test_a_group_shares_what_fsdp_shares_over_as_many() -> None:
    groups = run_of("devices=8", "num_nodes=2", "batch_size=16", "strategy=hsdp")
    assert (groups.shards, groups.is_sharded, groups.node_devices) == (8, True, 8)
    halves = run_of("devices=4", "strategy=hsdp", "strategy.shard_size=2")
    names = [part.name for part in plan_training(halves, device_memory_gib=1).memory]
    assert "student: float32 masters, 1/2" in names


def test_the_table_of_a_model_has_the_bytes_of_its_plans(sizes: dict[int, int], tmp_path: Path) -> None:
    words = ["model=tiny", "model.num_layers=2", "batch_size=8", "accumulate=8", "phi.rank=2", f"out={tmp_path}"]
    assert main(["benchmark", "strategies", *words]) == DONE
    rows = json.loads((tmp_path / "strategies-tiny.json").read_text())["rows"]
    assert [(row["nodes"], row["devices"]) for row in rows] == [(1, 1), (1, 2), (1, 4), (1, 8)]
    assert rows[2]["bytes"] == {"ddp": sizes[1], "fsdp": sizes[4]}
    assert rows[0]["bytes"] == {"single": sizes[1]}
    page = (tmp_path / "strategies-tiny.md").read_text()
    assert "predicted, not measured" in page.splitlines()[0]
    assert "| 1 x 2 | 1 | fsdp |" in page
