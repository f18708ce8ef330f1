"""Short runs of the real tiny model through the command line, for the tests that need what a run leaves behind."""

from __future__ import annotations

import atexit
import csv
import hashlib
import re
import shutil
import tempfile
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import torch

from qvgen.cli import main
from qvgen.config import TrainConfig
from qvgen.config.build import build
from qvgen.config.compose import compose_plain
from qvgen.config.leaves import load_leaf
from qvgen.models.weight_file import save_weights
from qvgen.training.checkpoint.replaced_folder import remove
from qvgen.training.checkpoint_writer import AtomicCheckpointIO

STEPS = 12
BOUNDARIES = (3, 6, 10)
"""First steps of rank 2, rank 1 and the tail, with the overrides below."""

SHORT = (
    "logger=csv",
    f"steps={STEPS}",
    "batch_size=4",
    "phi.rank=4",
    "evaluation.samples=4",
    "evaluation.videos=1",
    "evaluation.quality_videos=1",
    "model.num_inference_steps=2",
)
"""A run of seconds: two optimizer steps or more in each phase of Phi."""

UNSEEN = ("evaluation.videos=0", "evaluation.quality_videos=1", "evaluation.start_videos=false")
"""For a run whose weights and files are looked at and not its videos: few are sampled."""

WATCHED = (
    "+callbacks.early._target_=lightning.pytorch.callbacks.EarlyStopping",
    "+callbacks.early.monitor=val/relative_error",
    "+callbacks.early.patience=9",
    "+callbacks.rate._target_=lightning.pytorch.callbacks.LearningRateMonitor",
    "+logger.file._target_=lightning.pytorch.loggers.CSVLogger",
    "+logger.file.save_dir=${run_dir}",
    "+logger.file.name=file",
)
"""Callbacks and a logger of Lightning that look at a run and change nothing."""


@cache
def shallow(blocks: int) -> tuple[str, str]:
    """Overrides for the first blocks of the small model with their trained weights: layers of the same kinds, but fewer.

    For runs that are compared with each other; the cut model predicts no video, so no error says anything of a method.
    """
    folder = tempfile.mkdtemp(prefix="qvgen-tests-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    whole = load_leaf("model", "tiny").load_teacher().state_dict()
    last = re.compile(rf"blocks\.(?!({'|'.join(map(str, range(blocks)))})\.)")
    kept = {name: value for name, value in whole.items() if not last.match(name)}
    weights = save_weights(kept, Path(folder) / "shallow.safetensors", card={"blocks": blocks})
    return f"model.num_layers={blocks}", f"model.weights={weights}"


def one_block() -> tuple[str, ...]:
    """Overrides of the fixture ``block_run``: its checkpoints lie in each phase of Phi and on the boundaries 3 and 6."""
    return ("accumulate=2", "checkpoint.every_steps=3", "checkpoint.keep=9", *UNSEEN, *shallow(1))


def train(run_dir: Path, *overrides: str) -> int:
    """`qvgen train` in this process; the exit code."""
    return main(["train", *SHORT, f"run_dir={run_dir}", *overrides])


@cache
def composed(*overrides: str) -> dict[str, Any]:
    """The configuration's values, those in files included, read once: hydra takes half a second. Change only a copy."""
    return compose_plain("train", [*SHORT, *overrides])


def train_config(*overrides: str) -> TrainConfig:
    """What the verb would receive; its objects are new ones each time."""
    config = build("train", deepcopy(composed(*overrides)))
    assert isinstance(config, TrainConfig)
    return config


def method_schedule(config: TrainConfig) -> Any:
    """What the run's training method changes between its steps."""
    return config.method.schedule(config.phi, num_steps=config.steps)


def read_metrics(run_dir: Path) -> list[dict[str, str]]:
    """Rows of metrics.csv without the columns that measure time."""
    with (run_dir / "metrics.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return [
        {key: value for key, value in row.items() if key != "train/seconds" and not key.startswith("system/")}
        for row in rows
    ]


def packed_bytes(run_dir: Path) -> bytes:
    """The packed weights of a run."""
    return (run_dir / "packed" / "model.safetensors").read_bytes()


def copy_until(run_dir: Path, target: Path, *, step: int) -> Path:
    """A copy of a finished run as if it had been killed after the checkpoint of a step."""
    shutil.copytree(run_dir, target, ignore=shutil.ignore_patterns("packed", "report.*", "videos", ".lock"))
    for file in (target / "checkpoints").iterdir():
        if int(file.stem.removeprefix("step-")) > step:
            remove(file)
    return target


def load_state(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The module's tensors in a training checkpoint."""
    return load_checkpoint(checkpoint)["state_dict"]


def load_checkpoint(checkpoint: Path) -> dict[str, Any]:
    """A training checkpoint, a file or a folder, with whole tensors."""
    return AtomicCheckpointIO().load_checkpoint(checkpoint)


def snapshot(folder: Path) -> dict[str, str]:
    """sha256 of every file below a folder (the lock left out, it names a process)."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }
