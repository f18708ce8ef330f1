"""Validation videos of the real tiny model: checked against the family's own frames, and for what they may not touch."""

from __future__ import annotations

import csv
import logging
import math
import random
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn

from qvgen.config.conf_folder import using_directory
from qvgen.config.leaf_file import read_leaf
from qvgen.config.leaves import load_leaf
from qvgen.data.video import write_video
from qvgen.errors import UserError
from qvgen.evaluation.distance import psnr_db, ssim
from qvgen.evaluation.suite.paired_metrics import PairedMetrics
from qvgen.evaluation.validation_files import ValidationFiles, read_validation
from qvgen.training.callbacks.validation import ValidationVideos
from qvgen.training.distributed.plain_group import COLLECTIVE_TIMEOUT
from qvgen.training.trainer import Processes, build_trainer
from qvgen.verbs._parts import open_log
from tests.parts import prepared, video_callback
from tests.runs import shallow, train_config
from tests.training.validated import contents, times

PROMPTS = 5


@pytest.fixture(scope="module")
def teacher() -> nn.Module:
    return train_config(*shallow(1)).model.load_teacher()


@pytest.fixture(scope="module")
def student() -> nn.Module:
    return prepared(train_config("phi.rank=2", *shallow(1)))[0].train()


def five_prompts(
    directory: Path, *, encode: Any = None, teacher: nn.Module | None, prompts: int = PROMPTS
) -> ValidationVideos:
    config = train_config()
    files = ValidationFiles(directory, prompts=config.model.prompts[:prompts], seeds=range(7, 7 + prompts), fps=8)
    videos = ValidationVideos(
        files=files, family=config.model, teacher=teacher, encode=encode, every_steps=2, num_steps=3
    )
    videos.wait_seconds = 0
    return videos


def index_of(name: str) -> int:
    return int(Path(name).name[:2])


@pytest.fixture(scope="module")
def alone(teacher: nn.Module, student: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> ValidationVideos:
    """Videos of one process, for step 2."""
    videos = five_prompts(tmp_path_factory.mktemp("alone"), teacher=teacher)
    videos.write_videos(student, step=2, rank=0, world_size=1)
    return videos


def test_processes_share_out_the_prompts(
    teacher: nn.Module, student: nn.Module, alone: ValidationVideos, tmp_path: Path
) -> None:
    before: dict[str, int] = {}
    world_size = 3
    for rank in reversed(range(world_size)):  # in any order: none waits for another
        videos = five_prompts(tmp_path / "shared", teacher=teacher)
        videos.write_videos(student, step=2, rank=rank, world_size=world_size)
        after = times(tmp_path / "shared")
        assert before.items() <= after.items()  # what others wrote is as it was
        assert {index_of(name) for name in after.keys() - before.keys()} == set(range(rank, PROMPTS, world_size))
        before = after
    assert contents(tmp_path / "shared") == contents(alone.files.directory)
    names = [path.name for path in (tmp_path / "shared" / "step-000002").glob("*-student.mp4")]
    assert sorted(map(index_of, names)) == list(range(PROMPTS))
    assert alone.files.missing(2) == []


def test_a_video_of_nan_is_left_out_and_training_goes_on(
    teacher: nn.Module, student: nn.Module, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    videos = five_prompts(tmp_path, teacher=teacher)
    bias = student.get_parameter("proj_out.bias")
    kept = bias.detach().clone()
    with torch.no_grad():
        bias[0] = torch.nan
    try:
        videos.write_videos(student, step=2, rank=0, world_size=1)
    finally:
        with torch.no_grad():
            bias.copy_(kept)
    assert caplog.text.count("it is left out") == PROMPTS
    assert "NaN" in caplog.text
    assert videos.files.missing(2) == []  # nobody waits for them
    assert read_validation(tmp_path, verify=True) == ()
    assert not list(tmp_path.rglob("*-student.mp4"))
    videos.write_videos(student, step=2, rank=0, world_size=1)
    assert not list(tmp_path.rglob("*-student.mp4"))  # nor are they sampled again


def test_a_file_holds_the_frames_that_the_family_samples(
    teacher: nn.Module, student: nn.Module, tmp_path: Path
) -> None:
    family = train_config().model
    videos = five_prompts(tmp_path / "found", teacher=teacher)
    videos.write_videos(student, step=3, rank=1, world_size=4)
    videos.publish([], step=3)
    sampling = {"num_steps": family.num_inference_steps, "guidance_scale": family.guidance_scale}
    frames = {}
    for name, model in (("student", student), ("teacher", teacher)):
        frames[name] = family.generate(model.eval(), [family.prompts[1]], [8], **sampling)[0]
        expected = write_video(tmp_path / f"{name}.mp4", frames[name].numpy(), fps=8).read_bytes()
        path = videos.files.path(1, step=3 if name == "student" else None, variant=name)
        assert path.read_bytes() == expected
    student.train()
    assert path.name == "01-a-green-six-standing-still-seed8-teacher.mp4"
    kept = videos.files.load_teacher(1)
    assert kept is not None
    assert np.array_equal(kept, frames["teacher"].numpy())
    (video,) = read_validation(tmp_path / "found", verify=True)
    assert (video.step, video.prompt_index, video.prompt, video.seed, video.fps) == (3, 1, family.prompts[1], 8, 8)
    assert video.psnr_db == psnr_db(frames["student"], frames["teacher"], max_value=255)
    assert video.ssim == ssim(frames["student"], frames["teacher"], max_value=255)
    with (tmp_path / "found" / "metrics.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert [row[name] for name in ("step", "prompt_index", "seed")] == ["3", "1", "8"]
    assert (float(row["psnr_db"]), float(row["ssim"])) == (video.psnr_db, video.ssim)


def test_a_suite_measures_each_video_beside_the_teacher_s(
    teacher: nn.Module,
    student: nn.Module,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The values are those of the metrics of `qvgen evaluate`; what a suite has besides is left out by name."""
    (tmp_path / "conf" / "suite").mkdir(parents=True)
    (tmp_path / "conf" / "suite" / "own.yaml").write_text(
        "_target_: qvgen.evaluation.suite.metric_list.Suite\nmetrics: [psnr, ssim, temporal_flickering, fvd]\n"
    )
    with caplog.at_level(logging.INFO), using_directory(tmp_path / "conf"):
        metrics = PairedMetrics("own")
    assert list(metrics.metrics) == ["psnr", "ssim"]
    assert "evaluation.suite=own: fvd is left out: it does not compare single videos" in caplog.text
    videos = five_prompts(tmp_path / "found", teacher=teacher)
    videos.metrics = metrics
    before = torch.random.get_rng_state()
    videos.write_videos(student, step=3, rank=1, world_size=4)
    assert torch.equal(torch.random.get_rng_state(), before)
    videos.publish([], step=3)
    (video,) = read_validation(tmp_path / "found", verify=True)
    assert video.suite == {"psnr": video.psnr_db, "ssim": video.ssim}
    with (tmp_path / "found" / "metrics.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert list(row) == ["step", "prompt_index", "seed", "psnr_db", "ssim", "suite/psnr", "suite/ssim"]
    assert (float(row["suite/psnr"]), float(row["suite/ssim"])) == (video.psnr_db, video.ssim)
    frames = np.zeros((4, 16, 16, 3), dtype=np.uint8)

    def nothing(_: object) -> float:
        return math.nan

    monkeypatch.setattr(metrics.metrics["ssim"], "measure", nothing)
    assert metrics.measure(frames, frames, caption="a") == {}  # and training goes on
    assert "the suite's metrics of a validation video are left out: 'a': ssim is nan" in caplog.text


def test_sampling_leaves_modes_gradients_and_random_states_alone(
    teacher: nn.Module, student: nn.Module, tmp_path: Path
) -> None:
    family = train_config().model
    asked: list[str] = []

    def encode(captions: Sequence[str]) -> Mapping[str, Tensor]:
        asked.extend(captions)
        torch.rand(3)
        np.random.default_rng()
        np.random.rand(3)
        random.random()
        return family.encode(captions)

    student.train().proj_out.eval()  # a part that is not trained, for example
    modes = {name: module.training for name, module in student.named_modules()}
    for parameter in student.parameters():
        parameter.grad = torch.full_like(parameter, 0.5)
    state = (torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate())  # type: ignore[union-attr]
    five_prompts(tmp_path, teacher=teacher, encode=encode).write_videos(student, step=2, rank=4, world_size=5)
    assert set(asked) == {family.prompts[4], ""}
    assert torch.equal(torch.get_rng_state(), state[0])
    assert np.array_equal(np.random.get_state()[1], state[1])
    assert random.getstate() == state[2]
    assert {name: module.training for name, module in student.named_modules()} == modes
    assert not teacher.training
    for parameter in student.parameters():
        assert torch.equal(parameter.grad, torch.full_like(parameter, 0.5))
        parameter.grad = None
    student.train()


def test_without_a_teacher_the_student_is_alone(student: nn.Module, tmp_path: Path) -> None:
    videos = five_prompts(tmp_path, teacher=None)
    videos.write_videos(student, step=0, rank=0, world_size=5)
    videos.publish([], step=0)
    (video,) = read_validation(tmp_path, verify=True)
    assert (video.psnr_db, video.ssim, video.teacher) == (None, None, None)
    assert sorted(path.name[-11:] for path in (tmp_path / "step-000000").iterdir()) == ["student.mp4", "tudent.json"]
    assert (tmp_path / "metrics.csv").read_text().splitlines()[1] == "0,0,7,,"


def test_a_missing_video_is_a_warning_with_its_name(
    student: nn.Module, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    videos = five_prompts(tmp_path, teacher=None)
    for step in (0, 2):  # the other process wrote its share of the first step only
        videos.write_videos(student, step=step, rank=0, world_size=2)
        videos.publish([], step=step)
    videos.write_videos(student, step=0, rank=1, world_size=2)
    with caplog.at_level(logging.WARNING):
        videos.finish([], world_size=2)
    (record,) = caplog.records
    missing = [videos.files.path(index, step=2, variant="student") for index in (1, 3)]
    assert (
        record.getMessage() == f"validation videos of step 2 are missing, it is not logged: {missing[0]}, {missing[1]}"
    )
    steps = [line.split(",")[0] for line in (tmp_path / "metrics.csv").read_text().splitlines()[1:]]
    assert steps == ["0"] * 5 + ["2"] * 3


def test_rank_0_waits_for_the_others_at_the_end(
    student: nn.Module, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    videos = five_prompts(tmp_path, teacher=None)
    videos.wait_seconds = 600.0
    videos.write_videos(student, step=2, rank=0, world_size=2)
    videos.publish([], step=2)

    def other_process() -> None:
        time.sleep(0.3)
        videos.write_videos(student, step=2, rank=1, world_size=2)

    thread = threading.Thread(target=other_process)
    thread.start()
    videos.finish([], world_size=2)  # had it not waited, the table below would lack the other process's videos
    thread.join()
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert len((tmp_path / "metrics.csv").read_text().splitlines()) == 1 + PROMPTS


def test_wandb_gets_a_step_as_soon_as_it_is_complete(
    teacher: nn.Module, student: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    prompts = 2
    videos = five_prompts(tmp_path / "validation", teacher=teacher, prompts=prompts)
    videos.metrics.metrics["psnr"] = load_leaf("metric", "psnr")
    with open_log(train_config("logger=wandb"), tmp_path) as loggers:
        run = loggers[0]._run
        videos.write_videos(student, step=0, rank=0, world_size=2)
        videos.publish(loggers, step=0)
        loggers[0].log_metrics({"train/loss": 1.0}, step=1)
        assert "video/00" not in run.summary.keys()  # noqa: SIM118 - a summary is no dict
        videos.write_videos(student, step=2, rank=0, world_size=2)
        for step in (0, 2):
            videos.write_videos(student, step=step, rank=1, world_size=2)
        videos.publish(loggers, step=2)
        videos.finish(loggers, world_size=2)
        for step in (2, 3):  # a row is complete when the next one begins
            loggers[0].log_metrics({"train/loss": 2.0}, step=step)
        summary = dict(run.summary)
    found = [video for video in read_validation(videos.files.directory, verify=True) if video.step == 2]
    assert summary["video/step"] == 2
    for name in ("psnr_db", "ssim"):
        mean = sum(getattr(video, name) for video in found) / prompts
        assert summary[f"video/{name}"] == pytest.approx(mean, rel=1e-12)  # the order of a float64 sum
    assert summary["eval/psnr"] == pytest.approx(sum(video.suite["psnr"] for video in found) / prompts, rel=1e-12)
    for video in found:
        panel = summary[f"video/{video.prompt_index:02d}"]
        assert panel["caption"] == f"{video.prompt} (seed {video.seed}, step 2; teacher, student)"
    (record,) = tmp_path.rglob("*.wandb")
    until = time.monotonic() + 600  # another process writes it, and on a busy machine after run.finish() has returned
    while b"video/*" not in record.read_bytes() and time.monotonic() < until:
        time.sleep(0.2)
    assert b"video/*" in record.read_bytes()
    for index in range(prompts):
        logged = [path.read_bytes() for path in record.parent.glob(f"files/media/videos/video/{index:02d}_*.mp4")]
        made = [videos.files.path(index, step=step, variant="side-by-side").read_bytes() for step in (0, 2)]
        assert sorted(logged) == sorted(made)


def test_a_slow_process_is_waited_for() -> None:
    processes = Processes(rank=0, world_size=2, port=1)
    trainer = build_trainer(steps=1, accumulate=1, processes=processes, callbacks=[], loggers=[])
    assert isinstance(trainer.strategy, DDPStrategy)
    assert trainer.strategy._timeout == COLLECTIVE_TIMEOUT
    assert COLLECTIVE_TIMEOUT.total_seconds() * 1000 < 2**31  # gloo's counter of milliseconds


def test_the_configuration_says_how_often() -> None:
    for name in ("cogvideox", "cogvideox-5b", "cogvideox1.5", "wan", "wan-14b", "wan2.2-a14b", "wan2.2-ti2v"):
        assert read_leaf("model", name)["recipe"]["video_every_steps"] == 250
    assert train_config("model=wan").evaluation.video_every_steps == 250
    for overrides in ((), ("evaluation.video_every_steps=3", "evaluation.videos=0")):
        assert video_callback(train_config(*overrides), run_dir=Path(), teacher=None, encode=None) is None
    config = train_config("evaluation.video_every_steps=3", "evaluation.videos=3", "seed=7")
    videos = video_callback(config, run_dir=Path("run"), teacher=None, encode=None)
    assert videos is not None
    assert (videos.every_steps, videos.num_steps) == (3, config.steps)
    assert (videos.files.prompts, videos.files.seeds) == (config.model.prompts[:3], [7, 8, 9])
    assert videos.files.directory == Path("run/validation")
    with pytest.raises(UserError, match="evaluation.video_every_steps=0 must be greater than 0"):
        train_config("evaluation.video_every_steps=0")
    with pytest.raises(ValueError, match="2 validation prompts and 1 seeds"):
        ValidationFiles(Path(), prompts=["a", "b"], seeds=[1], fps=8)
