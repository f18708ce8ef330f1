"""Which threads compute, and when: the first call of a vector function inside torch is not safe between threads."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from qvgen.cpu_threads import VECTOR_FUNCTIONS, one_thread, set_threads

WATCH = """
import json, os, sys, torch
from torch.utils._python_dispatch import TorchDispatchMode

class Watch(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.first = {}

    def __torch_dispatch__(self, operator, types, arguments=(), named=None):
        self.first.setdefault(operator.overloadpacket._qualified_op_name, torch.get_num_threads())
        return operator(*arguments, **(named or {}))

with Watch() as imported:  # what modules make; torch has no thread yet that a fork would lack
    from qvgen.cli import main
    import qvgen.verbs.generate, qvgen.verbs.ptq
assert len(os.listdir("/proc/self/task")) == 1
for arguments in json.loads(sys.argv[1]):
    if os.fork() == 0:
        with Watch() as watch:
            watch.first.update(imported.first)
            code = main(arguments)
        print(json.dumps({"code": code, "first": watch.first}), flush=True)
        os._exit(0)
    os.wait()
"""


@pytest.fixture(scope="module")
def first_calls(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, int]]:
    """A run and a sampling, each forked where nothing was computed, and where the environment gives two threads.

    Returns:
        For each: operator -> threads that torch had at its first call.
    """
    folder = tmp_path_factory.mktemp("threads")
    commands = [
        [
            "ptq", "model=tiny", "init=rtn", "bits=4", "logger=csv", f"run_dir={folder / 'run'}", "strategy.threads=1",
            "evaluation.samples=1", "evaluation.quality_videos=1", "evaluation.videos=0",
        ],
        ["generate", "model=tiny", "prompt=a red three standing still", f"out={folder / 'videos'}", "num_steps=1"],
    ]  # fmt: skip
    process = subprocess.run(
        [sys.executable, "-c", WATCH, json.dumps(commands)],
        env={**os.environ, "OMP_NUM_THREADS": "2", "OPENBLAS_NUM_THREADS": "1"},  # numpy's threads begin at its import
        capture_output=True,
        text=True,
        check=True,
    )
    said = [json.loads(line) for line in process.stdout.splitlines() if line.startswith('{"code"')]
    assert [answer["code"] for answer in said] == [0, 0]
    return [answer["first"] for answer in said]


def test_a_run_computes_on_its_own_number_of_threads_from_the_first_operation_on(
    first_calls: list[dict[str, int]],
) -> None:
    first = first_calls[0]
    assert {"aten::sin", "aten::cos", "aten::bmm", "aten::addmm"} <= first.keys()
    constants = {"aten::lift_fresh"}  # what modules make while they are imported
    assert {operator for operator, number in first.items() if number > 1} <= constants


def test_sampling_calls_each_vector_function_first_on_one_thread(first_calls: list[dict[str, int]]) -> None:
    first = first_calls[1]
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
