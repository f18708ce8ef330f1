"""Two groups of two processes that share a model, continued over a boundary of Phi's ranks; and one process, which is near.

One process adds the gradients of a step's four parts one after another, two groups in pairs: the last bits of such sums
differ, and so does what follows from them, as far as :data:`NEAR`.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qvgen.cli import DONE
from tests.runs import copy_until, packed_bytes, read_metrics, train
from tests.training.distributed.test_hsdp import FOUR, OPTIONS, states

ONE = ("devices=1", "accumulate=4")
NEAR = 1e-5


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run on two groups of two processes, and on one process in four micro-batches."""
    folder = tmp_path_factory.mktemp("hsdp")
    for name, keys in {"four": FOUR, "one": ONE}.items():
        assert train(folder / name, *OPTIONS, *keys) == DONE
    return folder


def test_another_order_of_the_same_sums_is_near(runs: Path) -> None:
    for four, one in zip(states(runs / "four"), states(runs / "one"), strict=True):
        for name, value in four.items():
            torch.testing.assert_close(value, one[name], rtol=NEAR, atol=NEAR)
    for four, one in zip(read_metrics(runs / "four"), read_metrics(runs / "one"), strict=True):
        assert float(four["train/loss"]) == pytest.approx(float(one["train/loss"]), rel=NEAR)
        assert float(four["train/gradient_norm"]) == pytest.approx(float(one["train/gradient_norm"]), rel=NEAR)


def test_a_run_continues_over_a_rank_boundary_to_the_same_bytes(runs: Path, tmp_path: Path) -> None:
    run_dir = copy_until(runs / "four", tmp_path / "run", step=2)
    assert train(run_dir, *OPTIONS, *FOUR, "resume=true") == DONE
    assert packed_bytes(run_dir) == packed_bytes(runs / "four")
    assert read_metrics(run_dir) == read_metrics(runs / "four")


def test_a_run_that_began_in_groups_goes_on_without_them(runs: Path, tmp_path: Path) -> None:
    run_dir = copy_until(runs / "four", tmp_path / "run", step=2)
    assert train(run_dir, *OPTIONS, "devices=4", "strategy=fsdp", "resume=true") == DONE
    (*_, last), (*_, expected) = states(run_dir), states(runs / "four")
    for name, value in last.items():
        torch.testing.assert_close(value, expected[name], rtol=NEAR, atol=NEAR)
