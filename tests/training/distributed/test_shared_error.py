"""A held-out error that four processes measure: the bits of one that works on the same batches, whatever their number.

test_ddp.py and test_fsdp.py have the runs of two processes whose metrics and reports are those of one.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.training.distributed.shared_error_program import COUNTS, MESHES, Inputs, models


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of four processes says."""
    folder = tmp_path_factory.mktemp("shared")
    command = [sys.executable, str(Path(__file__).with_name("shared_error_program.py")), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(4)]


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("way", MESHES)
def test_all_processes_have_the_error_of_one(facts: list[dict[str, Any]], way: str, count: int) -> None:
    inputs, (model, other) = Inputs(count), models()
    wanted = inputs.relative_error(model, list(inputs.predictions(other)))
    assert wanted > 0.1
    assert [float.fromhex(rank[f"{way} {count}"][0]) for rank in facts] == [wanted] * 4
    for rank in facts if way != "ddp" else ():
        assert [float.fromhex(error) for error in rank[f"{way} {count} streamed"]] == [wanted] * 2


@pytest.mark.parametrize("count", COUNTS)
def test_each_batch_is_one_processes_work_and_shares_of_a_model_are_called_equally_often(
    facts: list[dict[str, Any]], count: int
) -> None:
    own = [len(range(rank, count, 4)) for rank in range(4)]
    assert [rank[f"ddp {count}"][1] for rank in facts] == own
    for way in ("fsdp", "hsdp"):
        assert [rank[f"{way} {count}"][1] for rank in facts] == [max(own)] * 4


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("way", ["fsdp", "hsdp"])
def test_rank_0_gets_the_outputs_of_all_batches_of_which_each_process_computes_some(
    facts: list[dict[str, Any]], way: str, count: int
) -> None:
    first, *others = (rank[f"{way} {count} outputs"] for rank in facts)
    assert first[0] == [value.tolist() for value in Inputs(count).predictions(models()[0])]
    assert [values for values, _ in others] == [None] * 3
    assert {calls for _, calls in (first, *others)} == {-(-count // 4)}


def test_a_process_that_is_asked_to_stop_stops_all(facts: list[dict[str, Any]]) -> None:
    assert [rank["stopped"] for rank in facts] == [True] * 4
