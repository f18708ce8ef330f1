"""Processes that are started ahead of a run: taken by the run that they were started for, ended where nobody takes them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from qvgen.training.distributed import ahead

WAITING = "from qvgen.training.distributed.child import wait_for_settings; wait_for_settings()"


@pytest.fixture(autouse=True)
def short_command(monkeypatch: pytest.MonkeyPatch) -> None:
    """A child that imports nothing and waits."""
    monkeypatch.setattr(ahead, "worker_command", lambda *_: [sys.executable, "-c", WAITING])


def plain(run_dir: Path, **changes: Any) -> dict[str, Any]:
    values = {"devices": 2, "num_nodes": 1, "dry_run": False, "steps": 4, "training": {"hang_minutes": None}}
    return {"run_dir": str(run_dir), **values, **changes}


def test_a_run_takes_the_processes_that_were_started_for_it_and_no_others(tmp_path: Path) -> None:
    mine, others = tmp_path / "mine", tmp_path / "others"
    with ahead.started_ahead("train", [plain(mine)], [None]):
        (waiting,) = ahead._waiting
        process = waiting._children[1]
        assert ahead.run_workers(others, plain(others), world_size=2, hang_minutes=None) is not waiting
        assert ahead.run_workers(mine, plain(mine), world_size=3, hang_minutes=None) is not waiting
        assert ahead.run_workers(mine, plain(mine), world_size=2, hang_minutes=None) is waiting
        assert process.poll() is None
        waiting.end()
    assert list(tmp_path.iterdir()) == []


def test_processes_that_nobody_takes_are_ended(tmp_path: Path) -> None:
    with ahead.started_ahead("train", [plain(tmp_path / "run")], [None]):
        process = ahead._waiting[0]._children[1]
        assert process.poll() is None
    assert process.poll() is not None
    assert ahead._waiting == []


@pytest.mark.parametrize(
    ("verb", "jobs"),
    [
        ("ptq", [{}]),
        ("train", [{"dry_run": True}]),
        ("train", [{"devices": 1}]),
        ("train", [{"num_nodes": 2}]),
        ("train", [{"steps": 0}]),
        ("train", [{}, {}]),
    ],
)
def test_what_has_no_other_processes_or_starts_them_itself_starts_none(
    tmp_path: Path, verb: str, jobs: list[dict[str, Any]]
) -> None:
    plains = [plain(tmp_path / str(number), **changes) for number, changes in enumerate(jobs)]
    with ahead.started_ahead(verb, plains, [None] * len(plains)):
        assert ahead._waiting == []
