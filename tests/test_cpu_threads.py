"""Which threads compute, and when: the first call of a vector function inside torch is not safe between threads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qvgen.cpu_threads import VECTOR_FUNCTIONS, one_thread, set_threads

WATCH = """
import json, sys, torch
from torch.utils._python_dispatch import TorchDispatchMode

class Watch(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.first = {}

    def __torch_dispatch__(self, operator, types, arguments=(), named=None):
        self.first.setdefault(operator.overloadpacket._qualified_op_name, torch.get_num_threads())
        return operator(*arguments, **(named or {}))

from qvgen.cli import main
with Watch() as watch:
    code = main(sys.argv[1:])
print(json.dumps({"code": code, "first": watch.first}))
"""


def first_calls(*arguments: str) -> dict[str, int]:
    """Run a command where the environment gives two threads; operator -> threads that torch had at its first call."""
    process = subprocess.run(
        [sys.executable, "-c", WATCH, *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        check=True,
    )
    said = json.loads(process.stdout.splitlines()[-1])
    assert said["code"] == 0
    first: dict[str, int] = said["first"]
    return first


def test_a_run_computes_on_its_own_number_of_threads_from_the_first_operation_on(tmp_path: Path) -> None:
    first = first_calls(
        "ptq", "model=tiny", "init=rtn", "bits=4", "logger=csv", f"run_dir={tmp_path / 'run'}", "strategy.threads=1",
        "evaluation.samples=1", "evaluation.quality_videos=1", "evaluation.videos=0",
    )  # fmt: skip
    assert {"aten::sin", "aten::cos", "aten::bmm", "aten::addmm"} <= first.keys()
    constants = {"aten::lift_fresh"}  # what modules make while they are imported
    assert {operator for operator, number in first.items() if number > 1} <= constants


def test_sampling_calls_each_vector_function_first_on_one_thread(tmp_path: Path) -> None:
    first = first_calls(
        "generate", "model=tiny", "prompt=a red three standing still", f"out={tmp_path / 'videos'}", "num_steps=1"
    )
    assert max(first.values()) == 2
    assert {name: first.get(f"aten::{name}") for name in VECTOR_FUNCTIONS} == dict.fromkeys(VECTOR_FUNCTIONS, 1)


def test_the_number_of_threads_is_what_was_asked_for_and_comes_back() -> None:
    before = torch.get_num_threads()
    try:
        set_threads(2)
        with one_thread():
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    with pytest.raises(ValueError, match="0 CPU threads; give 1 or more"):
        set_threads(0)
