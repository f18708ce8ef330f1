"""The line of a plan that says what processes share out: what test_ddp.py, test_fsdp.py and test_shared_passes.py run."""

from __future__ import annotations

import pytest

from qvgen.verbs._parts import training_run
from qvgen.verbs._shared_work import shared_work
from tests.runs import train_config

END, START = "held-out errors and videos of the end", "errors of the start"
FSDP = "devices=2 strategy=fsdp evaluation.every_steps=3"
SHARED_END = "held-out errors of the end, videos of the full-precision and the packed model"
OWN_END = "videos of the trained model and of its start"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("devices=1", []),
        ("devices=2 strategy=ddp evaluation.every_steps=null", [f"over 2 processes: {END}; rank 0 alone: {START}"]),
        (
            f"{FSDP} init=gptq",
            [
                "over 2 processes: the calibration, held-out errors every 3 steps, "
                f"{SHARED_END}; rank 0 alone: {START}, {OWN_END}"
            ],
        ),
        (f"{FSDP} strategy.low_host_memory=true", ["over 2 processes: held-out errors every 3 steps"]),
        (f"{FSDP} strategy.low_host_memory=true evaluation.every_steps=null", []),
    ],
)
def test_a_plan_says_who_does_what(words: str, expected: list[str]) -> None:
    config = train_config(*words.split())
    assert shared_work(config, training_run(config)) == [f"shared out {line}" for line in expected]
