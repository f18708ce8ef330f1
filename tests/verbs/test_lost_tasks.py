"""What test_lost_worker.py does, for every verb and every end, and for tasks of torchrun's."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from qvgen.cli import DONE
from tests.training.distributed.launchers import start
from tests.verbs.lost_worker_program import MESSAGE
from tests.verbs.test_lost_worker import CHEAP, ENDS, check, words_of

ALL = [(verb, how) for verb in ("evaluate", "generate", "precompute", "ptq") for how in ENDS]

TASK_ENDS = {
    "kill": r"rank      : 1 \(local_rank: 1\)\n  exitcode  : -9 ",
    "fail": rf"qvgen {{verb}}: rank 1 on \S+, at {{item}}: {MESSAGE}\n",
    "stop": r"waiting for \d+ s for what process \d+ on \S+, stopped by a signal has claimed in \S+: ended after ",
}


def check_task(verb: str, how: str, run: Path, folder: Path) -> None:
    """A task of torchrun's is named and ends the others; the same command goes on with what is there."""
    words = [word for word in words_of(verb, run, folder) if word != "devices=2"]
    noted = folder / "item.txt"
    agent = [sys.executable, "-m", "tests.torchrun_program", "--nnodes", "1", "--nproc-per-node", "2", "--standalone"]
    command = [*agent, "-m", "tests.verbs.lost_worker_program", *words, "hang_minutes=0.1"]
    assert start(command, folder / "own.log", {"QVGEN_TEST_LOST": f"{noted}:{how}"}).wait() == 1
    said = (folder / "own.log").read_text()
    assert re.search(TASK_ENDS[how].format(verb=verb, item=re.escape(noted.read_text())), said), said
    assert start([*agent, "-m", "qvgen.cli", *words], folder / "again.log").wait() == DONE


@pytest.mark.parametrize("how", list(TASK_ENDS))
@pytest.mark.parametrize("verb", ["evaluate", "precompute"])
def test_a_task_of_torchruns(verb: str, how: str, short_run: Path, tmp_path: Path) -> None:
    check_task(verb, how, short_run, tmp_path)


@pytest.mark.parametrize(("verb", "how"), sorted(set(ALL) - set(CHEAP)))
def test_each_verb_and_each_end(verb: str, how: str, short_run: Path, tmp_path: Path) -> None:
    check(verb, how, short_run, tmp_path)
