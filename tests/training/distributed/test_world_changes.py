"""A run that goes on with other processes and other strategies: the state that it goes on from is the same, bit for bit.

Checked against the checkpoint, put together, and against a run of one process that nobody stopped: losses to 1e-6.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qvgen.training.checkpoint_writer import checkpoints
from tests.runs import SHORT, load_checkpoint, read_metrics, shallow

STEPS = 12
PARTS = (
    ("a", "fsdp", 2, 2), ("b", "single", 1, 3), ("c", "fsdp", 2, 4), ("d", "fsdp", 4, 6), ("e", "ddp", 2, 7),
    ("f", "fsdp", 2, 8),
)  # fmt: skip
"""Name, strategy, processes, and the step after which it is stopped."""


def go_on(run_dir: Path, name: str, strategy: str, world_size: int, stop_after: int) -> None:
    overrides = [
        *SHORT, *shallow(1), f"steps={STEPS}", "ema.decay=0.5", "evaluation.videos=0", "checkpoint.keep=9",
        "evaluation.every_steps=null",
        "checkpoint.every_steps=50", f"devices={world_size}", f"strategy={strategy}",
    ]  # fmt: skip
    part = {"name": name, "overrides": overrides, "world_size": world_size, "stop_after": stop_after}
    (run_dir / "part.json").write_text(json.dumps(part))
    program = Path(__file__).with_name("world_program.py")
    done = subprocess.run([sys.executable, str(program), str(run_dir)], capture_output=True, text=True, check=False)
    logs = "".join(log.read_text() for log in (run_dir / "logs").glob("*.log"))
    assert done.returncode == 0, done.stderr[-3000:] + logs[-3000:]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run of one process, and the same steps by others in turn."""
    alone, changed = tmp_path_factory.mktemp("alone"), tmp_path_factory.mktemp("changed")
    go_on(alone, "all", "single", 1, PARTS[-1][3])
    for part in PARTS:
        go_on(changed, *part)
    return alone, changed


def test_the_state_is_the_same_bit_for_bit(runs: tuple[Path, Path]) -> None:
    _, run_dir = runs
    found = checkpoints(run_dir / "checkpoints")
    assert [path.is_dir() for path in found] == [strategy == "fsdp" for _, strategy, _, _ in PARTS]
    for (name, *_), before in zip(PARTS[1:], found, strict=False):
        loaded, saved = torch.load(run_dir / f"{name}.loaded"), load_checkpoint(before)
        wanted = {f"state_dict/{key}": value for key, value in saved["state_dict"].items()}
        wanted |= {f"average/{key}": value for key, value in saved["average"].items()}
        for index, entry in saved["optimizer_states"][0]["state"].items():
            wanted |= {f"moments/{index}/{key}": value for key, value in entry.items()}
        assert loaded.keys() == wanted.keys()
        assert len(wanted) > 300
        assert all(torch.equal(loaded[key], value) for key, value in wanted.items())


def test_losses_are_those_of_one_process(runs: tuple[Path, Path]) -> None:
    alone, changed = (read_metrics(run_dir) for run_dir in runs)
    assert [row["step"] for row in changed] == [str(step) for step in range(PARTS[-1][3])]
    for mine, other in zip(changed, alone, strict=True):
        assert float(mine["train/loss"]) == pytest.approx(float(other["train/loss"]), rel=1e-6)
