"""Phi's halving through DeepSpeed's own accessors: DeepSpeed itself on gloo, on a CPU, in a process of its own.

What ``strategy=deepspeed`` rests on is held here; runs with it are in test_zero_runs.py.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.consumers.conftest import run_program

REQUIREMENTS = ("deepspeed==0.19.8", "hjson==3.1.0", "py-cpuinfo==9.0.0", "msgpack==1.2.4", "einops==0.8.2")
"""DeepSpeed and what it imports that qvgen does not bring; never a torch."""


@pytest.mark.skipif(os.environ.get("QVGEN_LONG_TESTS") != "1", reason="QVGEN_LONG_TESTS=1 installs and runs DeepSpeed")
def test_a_halving_is_kept_by_the_accessors_and_lost_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    ranks = json.loads(run_program(REQUIREMENTS, "deepspeed_program.py", str(tmp_path)).splitlines()[-1])
    assert len(ranks) == 2
    for facts in ranks:
        assert len(facts) == 4
        assert all(facts.values()), facts
