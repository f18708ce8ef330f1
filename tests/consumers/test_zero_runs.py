"""Runs with ``strategy=deepspeed`` on two processes of a CPU, over two falls of Phi's rank, beside runs of one process.

DeepSpeed adds the same two gradients and steps the same numbers; its clipping rounds otherwise, and codes of 3 bits flip for
less: losses and weights are held within bounds, what a checkpoint gives to another strategy to the bit.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.consumers.conftest import run_program
from tests.consumers.test_deepspeed import REQUIREMENTS
from tests.runs import composed, load_checkpoint, read_metrics, shallow

STEPS = 6
OPTIONS = (
    *shallow(1),
    f"steps={STEPS}",
    "phi.rank=2",
    "evaluation.videos=0",
    "evaluation.every_steps=null",
    "checkpoint.keep=9",
    "checkpoint.every_steps=1",
)
"""Phi's rank falls before the steps 2 and 4."""
ZERO_2 = ("devices=2", "strategy=deepspeed", "evaluation.every_steps=3")
RUNS = {
    "one": ((), None),
    "zero2": (ZERO_2, None),
    "zero2 of two": ((*ZERO_2, "accumulate=2", "strategy.teacher_offload=true"), None),
    "one after zero2": ((), "zero2"),
    "zero2 after one": (ZERO_2, "one"),
    "spoiled": (ZERO_2, None),
}
"""Overrides of each, and the run whose checkpoint after step 3 it goes on from."""

pytestmark = pytest.mark.skipif(
    os.environ.get("QVGEN_LONG_TESTS") != "1", reason="QVGEN_LONG_TESTS=1 installs and runs DeepSpeed"
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """The folder of all runs, and what each process says of each."""
    folder = tmp_path_factory.mktemp("zero")
    parts = [
        {"name": name, "config": composed(*OPTIONS, *overrides), "from": before, "spoiled": name == "spoiled"}
        for name, (overrides, before) in RUNS.items()
    ]
    (folder / "parts.json").write_text(json.dumps(parts))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DS_ACCELERATOR", "cpu")
        run_program(REQUIREMENTS, "zero_program.py", str(folder))
    return folder, [json.loads((folder / f"said-{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("name", ["zero2", "zero2 of two", "zero2 after one"])
def test_a_run_is_that_of_one_process_within_a_bound(runs: tuple[Path, Any], name: str) -> None:
    folder = runs[0]
    mine, other = read_metrics(folder / name), read_metrics(folder / "one")
    assert [row["phi/rank"] for row in mine] == [row["phi/rank"] for row in other]
    for step, (row, wanted) in enumerate(zip(mine, other, strict=True)):
        assert float(row["train/loss"]) == pytest.approx(float(wanted["train/loss"]), rel=1e-5 if step < 2 else 1e-2)
        assert float(row["train/gradient_norm"]) == pytest.approx(
            float(wanted["train/gradient_norm"]), rel=1e-4 if step < 2 else 0.1
        )
    trained = [torch.load(folder / name / f"trained-{rank}.pt") for rank in range(2)]
    wanted = torch.load(folder / "one" / "trained-0.pt")
    assert trained[0].keys() == wanted.keys()
    for key, value in wanted.items():
        assert torch.equal(trained[0][key], trained[1][key]), key  # bit for bit on all ranks
        assert (trained[0][key].float() - value.float()).abs().max() <= 2e-3, key


@pytest.mark.parametrize("name", ["zero2", "zero2 of two"])
def test_a_checkpoint_is_that_of_every_strategy(runs: tuple[Path, Any], name: str) -> None:
    folder = runs[0]
    mine, other = (load_checkpoint(folder / run / "checkpoints" / "step-00000003.ckpt") for run in (name, "one"))
    assert mine["state_dict"].keys() == other["state_dict"].keys()
    assert {key: value.shape for key, value in mine["state_dict"].items()} == {
        key: value.shape for key, value in other["state_dict"].items()
    }
    states, wanted = (found["optimizer_states"][0]["state"] for found in (mine, other))
    assert wanted.keys() <= states.keys()
    for index, entry in wanted.items():
        assert float(states[index]["step"]) == float(entry["step"]), index  # Phi's begins anew with its rank
        for moment in ("exp_avg", "exp_avg_sq"):
            assert torch.allclose(states[index][moment], entry[moment], rtol=1e-2, atol=1e-4), (index, moment)


def test_the_plan_counts_what_a_process_keeps(runs: tuple[Path, Any]) -> None:
    """DeepSpeed fills the groups of the optimizer up, each by less than 64 bytes."""
    for rank in range(2):
        said = json.loads((runs[0] / "zero2" / f"sizes-{rank}.json").read_text())
        masters, moments = (
            said["planned"][f"{name}, float32, 1/2"] for name in ("DeepSpeed: masters", "optimizer: two moments")
        )
        assert 0 <= said["found"][0] - masters < 640
        assert said["found"][1] == 2 * said["found"][0]
        assert moments == pytest.approx(2 * masters, abs=2)


def test_the_state_goes_on_bit_for_bit(runs: tuple[Path, Any]) -> None:
    """The first step after a checkpoint has the loss that the run had there, which saw the same weights."""
    folder = runs[0]
    for name, before in (("one after zero2", "zero2"), ("zero2 after one", "one")):
        mine, other = read_metrics(folder / name)[3], read_metrics(folder / before)[3]
        assert float(mine["train/loss"]) == pytest.approx(float(other["train/loss"]), rel=1e-6), name


def test_a_value_that_deepspeed_loses_ends_the_run(runs: tuple[Path, Any]) -> None:
    for said in runs[1]:
        assert "DeepSpeed lost a value of a parameter of shape" in said["spoiled"]
        assert all(found is None for name, found in said.items() if name != "spoiled")
