"""Runs that a signal stops: what is saved, what is said, and that they go on to the bits of a run that nobody stopped.

The signals are real ones that this process sends to itself, inside of a step, a measurement and the sampling of a video.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import threading
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from torch import nn

from qvgen import stop_request
from qvgen.cli import INTERRUPTED, TERMINATED, main
from qvgen.config import TrainConfig
from qvgen.config.schema.sections import CheckpointConfig
from qvgen.data.datamodule import MeasuredData
from qvgen.training.callbacks.steps import MethodSchedule, StepMetrics
from qvgen.training.checkpoint_writer import CheckpointWriter, checkpoints
from qvgen.training.trainer import Processes, build_trainer, fit
from tests.parts import prepared, training_module, video_callback
from tests.runs import SHORT, load_state, method_schedule, read_metrics, shallow, train_config
from tests.training.validated import contents

NUM_STEPS = 6
CONFIG = (
    f"steps={NUM_STEPS}",
    "phi.ranks=[2]",
    "phi.tail_share=0.4",
    "evaluation.videos=1",
    "evaluation.video_every_steps=2",
    *shallow(1),
)
RARELY = CheckpointConfig(every_steps=50, every_minutes=None, keep=1)


class SignalIn(lightning.Callback):
    """Sends this process a signal in the first micro-batch of an optimizer step."""

    def __init__(self, step: int, number: int) -> None:
        self.step, self.number, self.is_sent = step, number, False

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self.step and not self.is_sent:
            self.is_sent = True
            os.kill(os.getpid(), self.number)


@cache
def _config() -> TrainConfig:
    return train_config(*CONFIG)


class Session:
    """A training session with real parts: two micro-batches per step, a measurement every second step."""

    def __init__(self, run_dir: Path, *, measured: Callable[[], None] = lambda: None, videos: bool = False) -> None:
        self.config = _config()
        self.run_dir, self.measured, self.with_videos = run_dir, measured, videos
        self.student, _ = prepared(self.config)
        run_dir.mkdir(exist_ok=True)

    def run(self, *further: lightning.Callback, checkpoint: CheckpointConfig = RARELY) -> dict[str, torch.Tensor]:
        """Train from the newest checkpoint; the student's tensors."""
        config, student = self.config, self.student
        schedule = method_schedule(config)
        assert schedule is not None
        split = config.data.open(config.model, split="train")
        module = training_module(
            replace(config, steps=NUM_STEPS),
            student=student.train(),
            teacher=config.model.load_teacher(),
            encode=split.encode,
            validate=self.measure,
            validate_every_steps=2,
        )
        steps = StepMetrics(self.run_dir / "metrics.csv", schedule=schedule, num_steps=NUM_STEPS)
        saves = CheckpointWriter(self.run_dir / "checkpoints", config=checkpoint, num_steps=NUM_STEPS)
        callbacks = [*further, MethodSchedule(schedule), steps, saves]
        if self.with_videos:
            videos = video_callback(config, run_dir=self.run_dir, teacher=None, encode=None)
            assert videos is not None
            callbacks.append(videos)
        trainer = build_trainer(
            steps=NUM_STEPS, accumulate=2, processes=Processes(), callbacks=callbacks, loggers=[], measured=True
        )
        data = MeasuredData(split, batch_size=4, accumulate=2, seed=config.seed)
        found = checkpoints(self.run_dir / "checkpoints")
        with stop_request.listening():
            fit(trainer, module, data, checkpoint=found[-1] if found else None)
        return {name: value.clone() for name, value in student.state_dict().items()}

    def measure(self, student: nn.Module) -> float:
        """A number that depends on the student, from a call of it that a stop leaves out."""
        self.measured()
        family = self.config.model
        video = torch.ones(1, *family.sample_shape)
        with torch.no_grad():
            output = family.predict(student, video, torch.tensor([500.0]), family.encode(family.prompts[:1]))
        return float(output.double().abs().mean())


def steps_saved(run_dir: Path) -> list[int]:
    return [int(path.stem.removeprefix("step-")) for path in checkpoints(run_dir / "checkpoints")]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """A run that nobody stopped."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    return run_dir, Session(run_dir, videos=True).run()


def check_same(run_dir: Path, state: dict[str, torch.Tensor], whole: tuple[Path, dict[str, torch.Tensor]]) -> None:
    assert state.keys() == whole[1].keys()
    assert all(torch.equal(value, whole[1][name]) for name, value in state.items())
    assert read_metrics(run_dir) == read_metrics(whole[0])


@pytest.mark.parametrize(("number", "step"), [(signal.SIGINT, 2), (signal.SIGUSR1, 5)])
def test_the_step_is_finished_and_saved_and_goes_on_to_the_same_bits(
    number: int, step: int, whole: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    session = Session(tmp_path / "run")
    with pytest.raises(stop_request.Stopped):
        session.run(SignalIn(step, number))
    assert steps_saved(session.run_dir) == [step + 1]
    assert len(read_metrics(session.run_dir)) == step + 1
    state = Session(tmp_path / "run").run()
    check_same(session.run_dir, state, whole)
    assert steps_saved(session.run_dir) == [NUM_STEPS]  # keep=1: the extra one is gone


def test_a_measurement_is_left_out_and_made_when_the_run_goes_on(
    whole: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    session = Session(tmp_path / "run", measured=lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(stop_request.Stopped):
        session.run()
    assert steps_saved(session.run_dir) == [2]
    assert [row["val/relative_error"] for row in read_metrics(session.run_dir)] == ["", ""]
    with pytest.raises(stop_request.Stopped):  # stopped again where it measures what it left out
        Session(tmp_path / "run", measured=lambda: os.kill(os.getpid(), signal.SIGTERM)).run()
    assert steps_saved(session.run_dir) == [2]
    check_same(session.run_dir, Session(tmp_path / "run").run(), whole)


def test_a_video_is_left_out_and_sampled_when_the_run_goes_on(
    whole: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    session = Session(tmp_path / "run", videos=True)
    calls = iter(range(1000))

    def count(module: nn.Module, inputs: object) -> None:
        if (
            not session.student.training and next(calls) == 2
        ):  # a video takes two calls; this is the first of the second
            os.kill(os.getpid(), signal.SIGINT)

    session.student.register_forward_pre_hook(count)
    with pytest.raises(stop_request.Stopped):
        session.run()
    done = session.run_dir / "validation"
    assert steps_saved(session.run_dir) == [2]
    assert contents(done).keys() < contents(whole[0] / "validation").keys()
    check_same(session.run_dir, Session(tmp_path / "run", videos=True).run(), whole)
    assert contents(done) == contents(whole[0] / "validation")


class SignalWhileSaving(lightning.Callback):
    """Sends this process a signal while the first checkpoint is put together."""

    def on_save_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if trainer.global_step == 1:
            os.kill(os.getpid(), signal.SIGTERM)


def test_minutes_ask_for_checkpoints_and_a_signal_leaves_each_whole(
    whole: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    assert steps_saved(whole[0]) == [NUM_STEPS]  # by steps alone
    with pytest.raises(stop_request.Stopped):
        Session(tmp_path / "run").run(SignalWhileSaving(), checkpoint=replace(RARELY, every_minutes=1e-9, keep=9))
    assert steps_saved(tmp_path / "run") == [1, 2]
    assert all(load_state(path) for path in checkpoints(tmp_path / "run" / "checkpoints"))
    assert not list((tmp_path / "run").rglob("*.tmp"))


def stop_when(is_time: Callable[[], bool], number: int, command: list[str]) -> int:
    """Run a command in this process, and send it a signal as soon as something is the case; the exit code.

    The signal may come between the moment that Python opens a file or a folder and the moment that a ``with`` holds it.
    Nothing can close that one, so what Python says of it is not a fault of the command.
    """
    has_ended = threading.Event()

    def watch() -> None:
        while not is_time():
            if has_ended.wait(0.002):
                return
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=watch)
    with stop_request.listening(), warnings.catch_warnings():  # whenever it comes, it does not end pytest
        warnings.simplefilter("ignore", ResourceWarning)
        thread.start()
        try:
            return main(command)
        finally:
            has_ended.set()
            thread.join()


def test_the_preparation_is_interruptible(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = tmp_path / "my run"
    command = ["train", *SHORT, f"run_dir='{run_dir}'", "resume=false"]
    assert stop_when((run_dir / "config.yaml").exists, signal.SIGTERM, command) == TERMINATED
    last = capsys.readouterr().err.splitlines()[-1]
    found = re.fullmatch(r"stopped (in the preparation, nothing is lost|after .*); continue with: (.*)", last)
    assert found is not None, last
    words = shlex.split(found[2])
    assert words == ["qvgen", "train", *SHORT, f"run_dir='{run_dir}'", "resume=true"]


def test_what_generate_made_is_counted(short_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "videos"
    seeds = f"seed=[{','.join(map(str, range(40)))}]"
    command = [
        "generate",
        f"packed={short_run / 'packed'}",
        "prompt=a red three moving up left",
        seeds,
        "num_steps=2",
        f"out={out}",
    ]
    assert stop_when(lambda: len(list(out.glob("*.mp4"))) >= 2, signal.SIGINT, command) == INTERRUPTED
    shown = capsys.readouterr()
    last = shown.err.splitlines()[-1]
    found = re.fullmatch(r"stopped after (\d+) of 40 videos, which are in (.*); continue with: (.*)", last)
    assert found is not None, last
    assert int(found[1]) == len(shown.out.splitlines()) == len(list(out.glob("*.mp4")))
    assert shlex.split(found[3]) == ["qvgen", *command]
    assert not list(out.glob("*.tmp"))


def test_no_further_job_of_a_sweep_begins(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["train", "-m", *SHORT, "seed=1,2,3", f"run_dir={tmp_path}/s${{seed}}"]
    assert stop_when((tmp_path / "s1" / "config.yaml").exists, signal.SIGINT, command) == INTERRUPTED
    stopped, *others = capsys.readouterr().err.splitlines()[-3:]
    assert shlex.split(stopped.partition("; continue with: ")[2])[2:] == [
        *SHORT, "seed=1", f"run_dir={tmp_path}/s1", "resume=true",
    ]  # fmt: skip
    for seed, line in zip((2, 3), others, strict=True):
        assert line.startswith("not begun: qvgen train ")
        assert shlex.split(line.partition(": ")[2])[2:] == [*SHORT, f"seed={seed}", f"run_dir={tmp_path}/s{seed}"]
    assert not (tmp_path / "s2").exists()
