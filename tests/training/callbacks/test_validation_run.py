"""Runs with validation videos: the bits of runs without them, resumed anywhere; for two processes see test_ddp.py."""

from __future__ import annotations

import csv
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from qvgen.config.schema.sections import CheckpointConfig
from qvgen.data.datamodule import MeasuredData
from qvgen.evaluation.validation_files import read_validation
from qvgen.training.callbacks.steps import MethodSchedule, StepMetrics
from qvgen.training.callbacks.validation import ValidationVideos
from qvgen.training.checkpoint_writer import CheckpointWriter, checkpoints
from qvgen.training.trainer import Processes, build_trainer, fit
from tests.parts import prepared, training_module, video_callback
from tests.runs import load_state, method_schedule, read_metrics, shallow, train_config
from tests.training.validated import contents, times

NUM_STEPS = 5
OPTIONS = (
    f"steps={NUM_STEPS}",
    "phi.ranks=[2]",
    "phi.tail_share=0.4",
    "evaluation.videos=2",
    "evaluation.video_every_steps=2",
    *shallow(1),
)
DUE = (0, 2, 4, 5)
"""Steps that are validated: the start, every second one, the last."""


def make_videos(run_dir: Path, *, teacher: nn.Module | None) -> ValidationVideos:
    """The callback that the options ask for."""
    videos = video_callback(train_config(*OPTIONS), run_dir=run_dir, teacher=teacher, encode=None)
    assert videos is not None
    return videos


def train(run_dir: Path, videos: ValidationVideos | None) -> None:
    """A training session with real parts on one process: two micro-batches per step, a checkpoint after each."""
    config = train_config(*OPTIONS)
    schedule = method_schedule(config)
    assert schedule is not None
    student, _ = prepared(config)
    split = config.data.open(config.model, split="train")
    module = training_module(
        replace(config, steps=NUM_STEPS),
        student=student.train(),
        teacher=config.model.load_teacher(),
        encode=split.encode,
    )
    steps = StepMetrics(run_dir / "metrics.csv", schedule=schedule, num_steps=NUM_STEPS)
    saves = CheckpointWriter(
        run_dir / "checkpoints",
        config=CheckpointConfig(every_steps=1, every_minutes=None, keep=9),
        num_steps=NUM_STEPS,
    )
    trainer = build_trainer(
        steps=NUM_STEPS,
        accumulate=2,
        processes=Processes(),
        callbacks=[MethodSchedule(schedule), steps, saves, *([videos] if videos else [])],
        loggers=[],
    )
    run_dir.mkdir(parents=True, exist_ok=True)
    data = MeasuredData(split, batch_size=4, accumulate=2, seed=config.seed)
    found = checkpoints(run_dir / "checkpoints")
    fit(trainer, module, data, checkpoint=found[-1] if found else None)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished session; read it, or change a copy."""
    path = tmp_path_factory.mktemp("validated") / "run"
    train(path, make_videos(path, teacher=train_config(*OPTIONS).model.load_teacher()))
    return path


def test_a_run_with_videos_trains_the_bits_of_one_without(run_dir: Path, tmp_path: Path) -> None:
    train(tmp_path, None)
    assert read_metrics(tmp_path) == read_metrics(run_dir)
    for step in range(1, NUM_STEPS + 1):
        name = f"checkpoints/step-{step:08d}.ckpt"
        found, expected = load_state(run_dir / name), load_state(tmp_path / name)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_the_start_every_few_steps_and_the_end_are_validated_once(run_dir: Path) -> None:
    directory = run_dir / "validation"
    folders = sorted(path.name for path in directory.iterdir())
    assert folders == ["metrics.csv", *(f"step-{step:06d}" for step in DUE), "teacher"]
    found = read_validation(directory, verify=True)
    assert [(video.step, video.prompt_index) for video in found] == [(step, index) for step in DUE for index in (0, 1)]
    assert [video.seed for video in found[:2]] == [42, 43]
    with (directory / "metrics.csv").open(newline="") as file:
        rows = [(int(row["step"]), int(row["prompt_index"]), float(row["psnr_db"])) for row in csv.DictReader(file)]
    assert rows == [(video.step, video.prompt_index, video.psnr_db) for video in found]
    assert len({video.student.read_bytes() for video in found}) == len(found)  # training changes what is sampled
    assert not list(directory.rglob("*.tmp"))


def killed_at(run_dir: Path, target: Path, *, step: int) -> Path:
    """A copy of a finished session as if it had been killed while it sampled after ``step``."""
    shutil.copytree(run_dir, target)
    for path in checkpoints(target / "checkpoints")[step:]:
        path.unlink()
    for later in (folder for folder in DUE if folder > step):
        shutil.rmtree(target / "validation" / f"step-{later:06d}")
    return target


class Unused(nn.Module):
    """A teacher that nobody may sample."""


def test_a_resumed_run_makes_what_is_missing_and_nothing_twice(run_dir: Path, tmp_path: Path) -> None:
    copy = killed_at(run_dir, tmp_path / "run", step=4)
    files = make_videos(copy, teacher=None).files
    files.path(0, step=4, variant="student").write_bytes(b"half")  # damaged
    files.path(1, step=4, variant="student").with_suffix(".json").unlink()  # never finished
    before = {name: stamp for name, stamp in times(copy / "validation").items() if "step-000004" not in name}
    train(copy, make_videos(copy, teacher=Unused()))
    assert contents(copy / "validation") == contents(run_dir / "validation")
    after = times(copy / "validation")
    assert {name: after[name] for name in before if "metrics" not in name} == {
        name: stamp for name, stamp in before.items() if "metrics" not in name
    }
    assert read_metrics(copy) == read_metrics(run_dir)


def test_a_run_killed_while_it_sampled_after_its_last_step_is_finished(run_dir: Path, tmp_path: Path) -> None:
    copy = killed_at(run_dir, tmp_path / "run", step=NUM_STEPS)
    shutil.rmtree(copy / "validation" / f"step-{NUM_STEPS:06d}")
    train(copy, make_videos(copy, teacher=Unused()))
    assert contents(copy / "validation") == contents(run_dir / "validation")
