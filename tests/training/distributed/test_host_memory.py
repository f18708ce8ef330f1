"""Memory of processes that save a checkpoint together, as host_memory_program.py measures it, against the plan.

Its measurement of a start takes longer, and small layers vanish beside what libraries load: docs/distributed.md has both, of
layers as wide as those of Wan 14B.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.warm_python import ROOT

PROGRAM = ROOT / "tests" / "training" / "distributed" / "host_memory_program.py"
WORDS = ("--width", "1024", "--feed-forward", "2816", "--blocks", "1", "--parts", "checkpoint")


def test_a_checkpoint_takes_one_more_copy_of_each_ranks_share(tmp_path: Path) -> None:
    command = [sys.executable, str(PROGRAM), *WORDS, "--out", str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    ranks = [json.loads(line) for line in ended.stdout.splitlines()]
    assert [rank["rank"] for rank in ranks] == [0, 1]
    for rank in ranks:
        assert rank["planned"] > 100e6
        assert abs(rank["own"] - rank["planned"]) < 0.1 * rank["planned"]
