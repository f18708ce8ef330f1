"""Four processes, two groups of two: what two processes with shares train in two micro-batches, bit for bit.

Both add the gradients of a step's four parts in pairs of the same samples: two shares of a micro-batch, then the two sums.
test_hsdp_resume.py has the run that is continued, and the one process that adds them in another order.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qvgen.cli import DONE
from tests.runs import UNSEEN, load_state, packed_bytes, read_metrics, shallow, train

STEPS = 3
OPTIONS = (
    f"steps={STEPS}", "phi.rank=2", "checkpoint.every_steps=2", "checkpoint.keep=9", "evaluation.samples=1",
    *shallow(1), *UNSEEN,
)  # fmt: skip
"""The rank of Phi falls before the steps 1 and 2."""
FOUR = ("devices=4", "strategy=hsdp", "strategy.shard_size=2")
TWO = ("devices=2", "strategy=fsdp", "accumulate=2")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run on two groups of two processes, and on one group in two micro-batches."""
    folder = tmp_path_factory.mktemp("hsdp")
    for name, keys in {"four": FOUR, "two": TWO}.items():
        assert train(folder / name, *OPTIONS, *keys) == DONE
    return folder


def states(run_dir: Path) -> list[dict[str, torch.Tensor]]:
    """What the checkpoints of a run hold of the student."""
    return [load_state(run_dir / "checkpoints" / f"step-{step:08d}.ckpt") for step in (2, STEPS)]


def test_two_groups_train_and_pack_what_one_does_in_two_micro_batches(runs: Path) -> None:
    assert [row["phi/rank"] for row in read_metrics(runs / "four")] == ["2", "1", "0"]
    for four, two in zip(states(runs / "four"), states(runs / "two"), strict=True):
        assert four.keys() == two.keys()
        assert all(torch.equal(value, two[name]) for name, value in four.items())
    assert packed_bytes(runs / "four") == packed_bytes(runs / "two")
    assert "Traceback" not in (runs / "four" / "logs" / "rank3.log").read_text()
