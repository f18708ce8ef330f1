"""Cases that several processes share out: none is made twice, none is forgotten, whoever ends in the middle."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest

from qvgen.data import claim_wait
from qvgen.data import claims as claims_module
from qvgen.data.claims import CLAIMS_FILE, Claims
from qvgen.evaluation.suite.case import Case
from qvgen.evaluation.suite.shared_cases import SharedCases

HOLDER = """
import fcntl, sys
file = open(sys.argv[1], "r+b")
fcntl.lockf(file, fcntl.LOCK_EX, 1, int(sys.argv[2], 16))
print(flush=True)
sys.stdin.read()
"""
"""Another process that claims a key, as the module of claims describes it."""


def key_of(case: Case) -> str:
    return hashlib.sha256(case.name.encode()).hexdigest()


def cases_named(*names: str) -> list[Case]:
    return [Case(name=name, prompt=0, seed=None, caption=None) for name in names]


def test_what_another_process_holds_comes_last_and_is_taken_when_that_one_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases, made, waits = cases_named("a", "b", "c"), [], []
    with Claims(tmp_path, key="out") as claims:
        held = key_of(cases[0])[: claims_module._DIGITS]
        command = [sys.executable, "-c", HOLDER, str(tmp_path / CLAIMS_FILE), held]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
            assert holder.stdout is not None
            holder.stdout.readline()

            def end_holder(seconds: float) -> None:
                waits.append(seconds)
                holder.kill()  # without having made what it holds
                holder.wait()

            monkeypatch.setattr(claim_wait.time, "sleep", end_holder)
            for case in SharedCases(cases, claims=claims, key=key_of, is_there=lambda case: case.name in made):
                made.append(case.name)
    assert made == ["b", "c", "a"]
    assert len(waits) == 1


def test_what_another_process_makes_meanwhile_is_not_made_again(tmp_path: Path) -> None:
    made: list[str] = []
    with Claims(tmp_path, key="out") as claims:
        shared = SharedCases(
            cases_named("a", "b", "c"), claims=claims, key=key_of, is_there=lambda case: case.name in [*made, "b"]
        )
        assert shared.num_there == 1
        for case in shared:
            made.append(case.name)
    assert made == ["a", "c"]
    assert shared.num_there == 3
