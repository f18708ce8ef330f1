"""Two processes that share the tokens of each sample out, against one process with all of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qvgen.cli import BAD_INPUT, DONE, main
from tests.models.hub_folders import make_wan_folder
from tests.runs import load_state, read_metrics
from tests.verbs.test_hub_models import train_keys, write_clips

STEPS = 3
TWO = ("devices=2", "strategy=ddp", "strategy.context_parallel=2")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run by one process and by two."""
    folder = tmp_path_factory.mktemp("context")
    clips = write_clips(folder / "clips", fps=16)
    keys = [
        key for key in train_keys("wan", make_wan_folder(folder / "model"), clips, folder) if not key.startswith("run_dir")
    ]
    for name, further in {"one": (), "two": TWO}.items():
        command = ["train", *keys, *further, f"run_dir={folder / name}", "evaluation.videos=0", "checkpoint.every_steps=1"]
        assert main([*command, "strategy.gradient_checkpointing=true", "checkpoint.keep=9"]) == DONE
    return folder


def test_losses(runs: Path) -> None:
    one, two = (read_metrics(runs / name) for name in ("one", "two"))
    for a, b in zip(one, two, strict=True):
        print({k: (a[k], b[k]) for k in a})
    for step in range(1, STEPS + 1):
        one, two = (load_state(runs / name / "checkpoints" / f"step-{step:08d}.ckpt") for name in ("one", "two"))
        print(step, max((float((one[k].float() - two[k].float()).abs().max()), k) for k in one))
    assert 0
