"""Runs of two processes of which rank 1 alone fails before the first step: both end, and one line says who and why."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from qvgen.cli import BAD_INPUT
from tests.runs import SHORT, UNSEEN, shallow
from tests.training.distributed.failing_rank import MESSAGE
from tests.training.distributed.launchers import TRAIN, codes, said, srun, start
from tests.training.distributed.test_launched_runs import own_lines

CALLBACK = "+callbacks.fail._target_=tests.training.distributed.failing_rank.FailingRank"
KEYS = (*SHORT, *UNSEEN, "steps=2", "phi.ranks=[2]", "strategy=ddp", *shallow(1), CALLBACK)


@pytest.mark.parametrize("place", ["build", "setup", "batch"])
def test_rank_0_says_what_went_wrong_in_another_task(place: str, tmp_path: Path) -> None:
    tasks = srun(tmp_path, *KEYS, f"run_dir={tmp_path / 'run'}", variables={"QVGEN_TEST_FAIL": place})
    assert codes(tasks) == [BAD_INPUT, BAD_INPUT], said(tmp_path)
    (line,) = own_lines(said(tmp_path))  # of both
    assert re.search(rf"rank 1 on \S+ failed: .*{MESSAGE}$", line), line
    assert line in (tmp_path / "task0.log").read_text()


@pytest.mark.parametrize("place", ["build", "batch"])
def test_rank_0_says_what_went_wrong_in_a_process_that_it_started(place: str, tmp_path: Path) -> None:
    words = [*TRAIN, *KEYS, "devices=2", f"run_dir={tmp_path / 'run'}"]
    process = start(words, tmp_path / "own.log", {"QVGEN_TEST_FAIL": place})
    assert process.wait() == BAD_INPUT, said(tmp_path)
    (line,) = own_lines(said(tmp_path))
    assert re.search(
        rf"the process of rank 1 on \S+ ended with exit code 2: qvgen worker: .*{MESSAGE} \(see .*rank1.log\)$", line
    )
    assert "Traceback" in (tmp_path / "run" / "logs" / "rank1.log").read_text()
