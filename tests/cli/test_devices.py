"""How many processes and which GPUs a command takes: chosen, written, or begun with. GPUs are only said to be there."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qvgen.cli import BAD_INPUT, DONE, main
from qvgen.config import TrainConfig
from qvgen.config.build import check
from qvgen.config.compose import compose_job, compose_plain
from qvgen.config.processes import device_choice, launched_world, visible_gpus
from qvgen.config.processes.launched_world import LaunchedWorld
from qvgen.errors import DOES_NOT_FIT, UserError
from qvgen.run_directory import write_plain
from qvgen.training.planning import training_plan
from qvgen.training.planning.memory import Device
from qvgen.verbs import _strategy
from qvgen.verbs import train as train_verb

KEYS = ("model=tiny", "logger=csv")
WORLD = LaunchedWorld(
    launcher="torchrun", rank=0, size=6, local_rank=0, local_size=3, node_rank=0, nodes=2, address="n1", port=1, session="s",
    has_store=True,
)  # fmt: skip

Machine = Callable[[int], None]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Says how many GPUs the machine has; those that the variable shows are counted."""

    def has(number: int) -> None:
        def count() -> int:
            shown = os.environ.get(visible_gpus.VARIABLE)
            return (
                number if shown is None else sum(entry.strip() in map(str, range(number)) for entry in shown.split(","))
            )

        monkeypatch.delenv(visible_gpus.VARIABLE, raising=False)
        monkeypatch.setattr(visible_gpus, "count_gpus", count)

    return has


def chosen(*words: str) -> tuple[dict[str, Any], str]:
    """What is written into the configuration, and the line about it."""
    plain, choice = compose_job("train", [*KEYS, *words])
    assert choice is not None
    check("train", plain)
    return plain, choice.line or ""


@pytest.mark.parametrize(
    ("number", "words", "devices", "accumulate", "line"),
    [
        (0, [], 1, 1, "devices=auto: 1 process on the CPU, no GPU is visible"),
        (1, [], 1, 1, "devices=auto: 1 process on the GPU that is visible"),
        (8, [], 8, 1, "devices=auto: all 8 GPUs"),
        (8, ["devices=auto", "batch_size=64"], 8, 1, "devices=auto: all 8 GPUs"),
        (8, ["model=cogvideox", "model.path=x", "data.path=x"], 8, 8, "devices=auto: all 8 GPUs"),
        (7, ["batch_size=48"], 6, 1, "devices=auto: 6 of 7 GPUs, the most that divide batch_size=48"),
        (8, ["batch_size=48", "accumulate=16"], 3, 16, "3 of 8 GPUs, the most that divide batch_size=48 / 16"),
        (8, ["strategy=single"], 1, 1, "1 of 8 GPUs, because strategy=single is one process"),
        (
            8,
            ["optim.gradients=bfloat16"],
            1,
            1,
            "because optim.gradients=bfloat16 is for one process with float32 masters",
        ),
        (8, ["method=autoencoder"], 1, 1, "because Autoencoder trains in one process"),
        (8, ["devices=2"], 2, 1, ""),
        (8, ["devices=[0,2]"], 2, 1, ""),
    ],
)
def test_devices_are_a_number_that_divides_the_batch(
    machine: Machine, number: int, words: list[str], devices: int, accumulate: int, line: str
) -> None:
    machine(number)
    plain, said = chosen(*words)
    assert (plain["devices"], plain["accumulate"]) == (devices, accumulate)
    assert line in said
    assert bool(line) == bool(said)
    assert plain["strategy"]["name"] == ("single" if devices == 1 else "auto")
    assert plain["batch_size"] % (devices * accumulate) == 0


def test_hidden_gpus_are_not_counted(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(8)
    monkeypatch.setenv(visible_gpus.VARIABLE, "1,4")
    assert chosen()[0]["devices"] == 2


def test_clips_are_shared_out_over_any_number(machine: Machine) -> None:
    def processes(*words: str) -> int:
        number: int = compose_plain("precompute", ["data.path=x", *words])["devices"]
        return number

    machine(7)
    assert (processes(), processes("devices=3"), processes("devices=[0,2]")) == (7, 3, 2)
    machine(0)
    assert processes() == 1
    launched_world.enter(WORLD)  # its tasks are the processes, unless each was given a share
    try:
        machine(8)
        assert (processes(), processes("devices=4", "num_shards=6")) == (1, 4)
        with pytest.raises(UserError, match="devices=4: torchrun started 6 processes, which share out the work"):
            processes("devices=4")
    finally:
        launched_world.enter(None)


def test_another_launcher_says_how_many(machine: Machine) -> None:
    machine(8)
    launched_world.enter(WORLD)
    try:
        plain, said = chosen("batch_size=24")
        assert (plain["devices"], plain["num_nodes"], said) == (3, 2, "")
        with pytest.raises(UserError, match=r"devices=\[0,2\]: torchrun started the processes, .*CUDA_VISIBLE_DEVICES"):
            chosen("devices=[0,2]")
    finally:
        launched_world.enter(None)


@pytest.mark.parametrize("strategy", ["single", "fsdp"])
def test_a_run_goes_on_with_what_it_began_with(machine: Machine, tmp_path: Path, strategy: str) -> None:
    machine(2)
    number = 1 if strategy == "single" else 2
    began = compose_plain("train", [*KEYS, f"devices={number}", f"strategy={strategy}", f"run_dir={tmp_path}"])
    write_plain(tmp_path / "config.yaml", began)
    machine(4)
    plain, said = chosen(f"run_dir={tmp_path}", "resume=true")
    assert said == f"devices=auto: {number}, as the run began"
    assert {**plain, "typed": []} == {**began, "typed": [], "resume": True}
    assert chosen(f"run_dir={tmp_path / 'new'}", "resume=true")[0]["devices"] == 4


def test_a_run_goes_on_with_the_gpus_that_are_there(machine: Machine, tmp_path: Path) -> None:
    machine(8)
    write_plain(tmp_path / "config.yaml", compose_plain("train", [*KEYS, "devices=8", "strategy=fsdp"]))
    machine(3)
    plain, said = chosen(f"run_dir={tmp_path}", "resume=true")
    assert (plain["devices"], plain["strategy"]["name"]) == (2, "auto")  # the plan of two says whether it fits
    assert said.startswith("devices=auto: 2, where the run began with 8: 3 GPUs are visible")
    assert said.endswith(f", the most that divide batch_size={plain['batch_size']}")
    machine(1)
    plain, said = chosen(f"run_dir={tmp_path}", "resume=true")
    assert (plain["devices"], plain["strategy"]["name"]) == (1, "single")
    machine(0)  # the processes of a CPU
    assert chosen(f"run_dir={tmp_path}", "resume=true")[0]["devices"] == 8


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["devices=0"], "devices=0 must be greater than 0"),
        (["devices=[0,0]"], r"devices=\[0,0\] names a GPU twice"),
        (["devices=[]"], r"devices=\[\] names no GPU; write for example devices=\[0,2\]"),
        (["devices=[0,-1]"], r"devices=\[0,-1\] is no list of GPUs"),
        (["devices=[0,true]"], "is no list of GPUs"),
        (["devices=all"], "devices=all is neither auto, nor a number of processes"),
        (["devices=null"], "devices=null is neither auto"),
        (["devices=1.5"], "devices=1.5 is neither auto"),
        (["devices=4", "strategy=hsdp"], r"num_nodes=1; write for example strategy\.shard_size=2, or strategy=fsdp"),
        (["devices=2", "strategy=hsdp"], "num_nodes=1; write strategy=fsdp"),
        (["devices=4", "strategy=hsdp", "strategy.shard_size=4"], "groups of 4 of 4 .* that is all of them"),
        (["devices=4", "strategy=hsdp", "strategy.shard_size=1"], "one process shares nothing"),
        (["devices=4", "strategy=hsdp", "strategy.shard_size=3"], "shard_size=3 neither divides the 4 devices"),
        (["devices=4", "num_nodes=2", "strategy=hsdp", "strategy.shard_size=0"], "shard_size=0 must be greater than 0"),
        (["devices=2", "strategy.shard_size=2"], "shard_size=2 is of strategy=hsdp, and strategy=auto"),
        (["devices=2", "strategy=auto", "optim.gradients=bfloat16"], "and strategy=auto: its processes send gradients"),
        (["devices=3", "batch_size=32"], "batch_size=32 cannot be divided by devices=3 x accumulate=1"),
    ],
)
def test_what_is_wrong_is_said(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        check("train", compose_plain("train", [*KEYS, *words]))
    assert "\n" not in str(caught.value)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, str | None]]:
    """Processes, and GPUs that are visible, of each run that is started; it does nothing."""
    found: list[tuple[int, str | None]] = []

    def run(config: TrainConfig) -> None:
        device_choice.say_chosen()
        found.append((config.devices, os.environ.get(visible_gpus.VARIABLE)))

    monkeypatch.setattr(train_verb, "run", run)
    return found


def test_a_list_shows_those_gpus_to_the_run_alone(
    machine: Machine, started: list[tuple[int, str | None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(8)
    assert main(["train", *KEYS, "devices=[0,2]"]) == DONE
    assert visible_gpus.VARIABLE not in os.environ
    monkeypatch.setenv(visible_gpus.VARIABLE, "5, 3,4")
    assert main(["train", *KEYS, "devices=[2,0]"]) == DONE
    assert os.environ[visible_gpus.VARIABLE] == "5, 3,4"
    assert main(["train", *KEYS, "devices=[1]"]) == DONE
    assert started == [(2, "0,2"), (2, "4,5"), (1, "3")]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["devices=[0,3]"],
            "devices=[0,3]: 3 GPUs are visible here, numbered from 0; leave out those that are not there",
        ),
        (["devices=4"], "devices=4: 3 GPUs are visible here, numbered from 0, and each process needs one"),
        (["-m", "devices=[0],[1]"], "the jobs of one command train on the same GPUs"),
    ],
)
def test_gpus_that_are_not_there_are_refused_with_what_is(
    machine: Machine,
    started: list[tuple[int, str | None]],
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    message: str,
) -> None:
    machine(3)
    assert main(["train", *KEYS, *words]) == BAD_INPUT
    assert message in capsys.readouterr().err
    assert not started
    assert visible_gpus.VARIABLE not in os.environ


def test_processes_of_a_cpu_need_no_gpu(machine: Machine, started: list[tuple[int, str | None]]) -> None:
    machine(0)
    assert main(["train", *KEYS, "devices=2"]) == DONE
    assert started == [(2, None)]


def test_cuda_that_has_begun_sees_no_other_gpus(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(3)
    begun = SimpleNamespace(cuda=SimpleNamespace(is_initialized=lambda: True))
    monkeypatch.setitem(sys.modules, "torch", begun)
    with (
        pytest.raises(UserError, match=r"devices=\[0,1\]: this process uses GPUs already"),
        visible_gpus.only_gpus((0, 1)),
    ):
        pass


def test_what_was_chosen_is_said_once_a_job_begins(
    machine: Machine, started: list[tuple[int, str | None]], caplog: pytest.LogCaptureFixture
) -> None:
    machine(4)
    with caplog.at_level(logging.INFO, logger="qvgen.config.processes.device_choice"):
        assert main(["train", "-m", *KEYS, "seed=1,2", "batch_size=32"]) in (DONE, BAD_INPUT)  # nothing to compare
    assert [line for line in caplog.messages if line.startswith("devices=")] == ["devices=auto: all 4 GPUs"]
    assert [number for number, _ in started] == [4, 4]


def test_gpus_that_cuda_cannot_use_are_no_cpu(
    machine: Machine, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    machine(2)
    assert main(["train", *KEYS, "batch_size=4", f"run_dir={tmp_path / 'run'}"]) == BAD_INPUT
    assert "2 GPUs are visible, and torch can't use them here" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_other_verbs_stay_one_process(machine: Machine) -> None:
    machine(8)
    for verb in ("ptq", "benchmark"):
        plain = compose_plain(verb, ["model=tiny"])
        assert (plain["devices"], plain["strategy"]["name"]) == (1, "single")


def test_a_run_that_fits_nowhere_is_not_started(
    machine: Machine, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(2)
    small = Device(name="a small card", nbytes=2**20, on_gpu=True, is_here=False)
    for module in (_strategy, training_plan):
        monkeypatch.setattr(module, "find_device", lambda *_, **__: small)
    words = ("model.num_layers=1", "batch_size=4", "steps=12", "phi.rank=2", f"run_dir={tmp_path / 'run'}")
    assert main(["train", *KEYS, *words]) == DOES_NOT_FIT
    assert capsys.readouterr().out.startswith("DOES NOT FIT: ")
    assert not (tmp_path / "run").exists()
