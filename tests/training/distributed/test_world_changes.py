"""A run that goes on with other processes and other strategies: the state that it goes on from is the same, bit for bit.

Checked against the checkpoint, put together, and against a run of one process that nobody stopped. Products of fewer rows may
be added in another order, and a 3-bit code that lies between two flips then: losses are equal to 1e-7 until one does, and up
to 1.4e-3 apart afterwards (measured on one processor; on another none flipped).
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qvgen.training.checkpoint_writer import checkpoints
from tests.runs import composed, load_checkpoint, read_metrics, shallow

STEPS = 12
PARTS = (("a", "single", 1, 1), ("b", "fsdp", 4, 2), ("c", "fsdp", 2, 3), ("d", "ddp", 2, 4))
"""Name, strategy, processes, and the last step that is saved."""
FAULTS = {"b": "killed", "c": "full"}
"""Parts that save every step, and are ended while they save the second one in the background."""


def go_on(run_dir: Path, name: str, strategy: str, world_size: int, stop_after: int) -> str:
    """Train; what rank 0 says on stderr."""
    fault = FAULTS.get(name)
    overrides = [
        *shallow(1), f"steps={STEPS}", "ema.decay=0.5", "evaluation.videos=0", "checkpoint.keep=9",
        "evaluation.every_steps=null", f"checkpoint.every_steps={1 if fault else 50}", f"devices={world_size}",
        f"strategy={strategy}",
    ]  # fmt: skip
    part = {"name": name, "config": composed(*overrides), "world_size": world_size, "fault": fault}
    (run_dir / "part.json").write_text(json.dumps(part | {"stop_after": STEPS if fault else stop_after}))
    program = Path(__file__).with_name("world_program.py")
    done = subprocess.run([sys.executable, str(program), str(run_dir)], capture_output=True, text=True, check=False)
    logs = "".join(log.read_text() for log in (run_dir / "logs").glob("*.log"))
    assert (done.returncode == 0) is (fault is None), done.stderr[-3000:] + logs[-3000:]
    return done.stderr


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, str]]:
    """A run of one process; the same steps by others in turn; and what these said."""
    alone, changed = tmp_path_factory.mktemp("alone"), tmp_path_factory.mktemp("changed")
    go_on(alone, "all", "single", 1, PARTS[-1][3])
    return alone, changed, {part[0]: go_on(changed, *part) for part in PARTS}


def put_together(run_dir: Path, name: str) -> dict[str, torch.Tensor]:
    """The state that a part began with: the rows of all its processes, and what each of them has whole."""
    parts = [torch.load(path) for path in sorted(run_dir.glob(f"{name}.loaded-*"))]
    rows = {key: torch.cat([part["rows"][key] for part in parts]) for key in parts[0]["rows"]}
    return rows | parts[0]["whole"]


def test_the_state_is_the_same_bit_for_bit(runs: tuple[Path, Path, dict[str, str]]) -> None:
    _, run_dir, _ = runs
    found = checkpoints(run_dir / "checkpoints")
    assert [path.name for path in found] == [f"step-{step:08d}.ckpt" for *_, step in PARTS]
    assert [path.is_dir() for path in found] == [strategy == "fsdp" for _, strategy, _, _ in PARTS]
    for (name, *_), before in zip(PARTS[1:], found, strict=False):
        loaded, saved = put_together(run_dir, name), load_checkpoint(before)
        wanted = {f"state_dict/{key}": value for key, value in saved["state_dict"].items()}
        wanted |= {f"average/{key}": value for key, value in saved["average"].items()}
        for index, entry in saved["optimizer_states"][0]["state"].items():
            wanted |= {f"moments/{index}/{key}": value for key, value in entry.items()}
        assert loaded.keys() == wanted.keys()
        assert len(wanted) > 300
        assert all(torch.equal(loaded[key], value) for key, value in wanted.items())


def test_losses_are_those_of_one_process(runs: tuple[Path, Path, dict[str, str]]) -> None:
    alone, changed = (read_metrics(run_dir) for run_dir in runs[:2])
    assert [row["step"] for row in changed] == [str(step) for step in range(PARTS[-1][3])]
    for step, (mine, other) in enumerate(zip(changed, alone, strict=True)):
        bound = 1e-6 if step < 2 else 1e-2  # another sample or another noise is a tenth away
        assert float(mine["train/loss"]) == pytest.approx(float(other["train/loss"]), rel=bound)


def test_a_process_that_is_killed_while_it_saves_leaves_the_checkpoint_before(
    runs: tuple[Path, Path, dict[str, str]],
) -> None:
    assert "the process of rank 1 on " in runs[2]["b"]
    assert "was killed by signal SIGKILL" in runs[2]["b"]
    # The next part began with the last one that was whole, as the other tests see; what was left of this one is gone.
    assert [path.name for path in (runs[1] / "checkpoints").glob(".step-00000003*")] == []


def test_a_disk_that_is_full_while_training_goes_on_ends_it_with_its_message(
    runs: tuple[Path, Path, dict[str, str]],
) -> None:
    assert "cannot write it, File too large (rank-00002-of-00002.safetensors): " in runs[2]["c"]
    assert "step-00000004.ckpt" in runs[2]["c"].splitlines()[-1]
