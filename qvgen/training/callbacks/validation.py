"""Validation videos: the student samples the same prompts from the same seeds again and again while it is trained.

    step        0               every_steps        2 every_steps      ...   num_steps
    rank 0      prompt 0, 3     prompt 0, 3        prompt 0, 3
    rank 1      prompt 1, 4     prompt 1, 4        prompt 1, 4              each into files of its own
    rank 2      prompt 2        prompt 2           prompt 2

No process waits for another one here: there is no collective, only files that are there whole or not at all. Any number
of prompts fits any number of processes. Rank 0 logs a step as soon as all its files are there, which may be later than
the step; a slow process holds the others up in their next all-reduce, whose timeout (trainer.py) is days.

Training does not notice: gradients, modes of the modules and every global random state are as before, so that a run has
the same bits with and without videos. The student is sampled with Phi, the way it is trained.

Models of which a call is the work of several processes (``together``: their parameters are sharded, or a sample's tokens)
run on all processes at once: every process samples every prompt then, and rank 0 decides which are due and writes the files.
Where parameters are sharded the bits are the same and the time is not shared; where tokens are, each process of a group
computes its part of them (:mod:`qvgen.models.context_parallel`).
"""

from __future__ import annotations

import logging
import time
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import lightning
import torch
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.seed import isolate_rng
from torch import distributed, nn

from qvgen import stop_request
from qvgen.data.video import Frames
from qvgen.evaluation.distance import psnr_db, ssim
from qvgen.evaluation.placement import sampling_device
from qvgen.evaluation.prompts import shown_videos
from qvgen.evaluation.sampling import generate_videos
from qvgen.evaluation.suite.paired_metrics import PairedMetrics
from qvgen.evaluation.validation_files import DIRECTORY, SUITE, ValidationFiles, read_validation
from qvgen.models.base import Encode, VideoDiT
from qvgen.models.context_parallel import SharedSequence
from qvgen.models.sampled_video import UnusableVideoError
from qvgen.training.blocks.compiled import uncompiled
from qvgen.training.design.training_run import TrainingOutput, TrainingRun
from qvgen.training.module import VideoTraining
from qvgen.training.stop_point import interruptible
from qvgen.training.tracking.validation_panels import log_videos
from qvgen.training.tracking.wandb_run import WandbRun

log = logging.getLogger(__name__)

WAIT_SECONDS = 7200.0
"""How long rank 0 waits for the others' last videos when training is over. One that died ends the run at once
(launcher.py); this is for one that has more prompts than rank 0 or a slower device."""

POLL_SECONDS = 0.2


class ValidationVideos(lightning.Callback):
    """Samples a run's validation prompts before the first step, every so many steps, and after the last.

    Put it behind CheckpointWriter: a process that is killed while it samples continues from the step that it sampled at.

    Args:
        files: Prompts, seeds, and where the videos go.
        family: Samples, as it usually does.
        teacher: The full-precision model to compare with; it may lie on the CPU. None: the student's videos alone.
        encode: Stands in place of the family's, so that no text encoder runs.
        every_steps: Optimizer steps between two validations.
        num_steps: Optimizer steps of the run.
        together: A call of student or teacher is the work of several processes.

    Attributes:
        metrics: What is measured of a video besides its PSNR and SSIM; nothing unless it is set.
        context: Processes that share a sample's tokens out; 1 unless it is set.
        wait_seconds: How long rank 0 waits at the end.
    """

    def __init__(
        self,
        *,
        files: ValidationFiles,
        family: VideoDiT,
        teacher: nn.Module | None,
        encode: Encode | None,
        every_steps: int,
        num_steps: int,
        together: bool = False,
    ) -> None:
        self.files, self.family, self.teacher, self.encode = files, family, teacher, encode
        self.every_steps, self.num_steps, self.wait_seconds = every_steps, num_steps, WAIT_SECONDS
        self.together, self.metrics = together, PairedMetrics(None)
        self.context, self._sequences = 1, dict[nn.Module, SharedSequence]()
        self._last_step = 0
        self._unlogged: list[int] = []

    def on_load_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Learn where the run goes on; the trainer itself is told after on_fit_start."""
        del trainer, pl_module
        self._last_step = int(checkpoint["global_step"])

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Validate the start, or what a killed process left undone; also in a run that has no step left."""
        self._validate(trainer, pl_module)

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Validate once per optimizer step that is due, however many micro-batches it has."""
        del outputs, batch, batch_idx
        if trainer.global_step != self._last_step:
            self._last_step = trainer.global_step
            assert isinstance(pl_module, VideoTraining)
            if not pl_module.is_measured(self._last_step):
                self._validate(trainer, pl_module)

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Validate a step that was measured, after its checkpoint; what is there whole is not sampled again."""
        self._validate(trainer, pl_module)

    def on_fit_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Log what was not complete yet."""
        del pl_module
        if trainer.is_global_zero:
            self.finish(trainer.loggers, world_size=trainer.world_size)

    def is_due(self, step: int) -> bool:
        """Whether videos are sampled after an optimizer step."""
        return step % self.every_steps == 0 or step == self.num_steps

    def _validate(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        step = self._last_step
        if not self.is_due(step):
            return
        assert isinstance(pl_module, VideoTraining)
        with pl_module.averaged(pl_module.student):
            self.write_videos(pl_module.student, step=step, rank=trainer.global_rank, world_size=trainer.world_size)
        if trainer.is_global_zero:
            self.publish(trainer.loggers, step=step)

    def write_videos(self, student: nn.Module, *, step: int, rank: int, world_size: int) -> None:
        """Sample and write a process's prompts of a step; what is there whole is left as it is."""
        mine, writes = range(rank, len(self.files), world_size), True
        if self.together:
            mine, writes = range(len(self.files)), rank == 0
        due = self._agreed([i for i in mine if not self.files.has_student(i, step=step)])
        if due:
            log.info("step %d: sampling the validation prompts %s", step, ", ".join(map(str, due)))
        for index in due:
            teacher = self._teacher_frames(index, writes=writes)
            try:
                frames = self._sample(student, index)
            except UnusableVideoError as error:  # a finding, and no reason to lose a training for
                log.warning("step %d: %s; it is left out", step, error)
                if writes:
                    self.files.leave_out(index, step=step, reason=str(error))
                continue
            if not writes:
                continue
            measured = {}
            if teacher is not None:  # on the student's device: a large video's SSIM takes minutes on a CPU core
                measured = _distance(frames, teacher, next(student.parameters()).device)
                with isolate_rng():  # networks are made before their weights are read
                    found = self.metrics.measure(frames, teacher, caption=self.files.prompts[index])
                measured |= {f"{SUITE}{name}": value for name, value in found.items()}
            self.files.write_student(index, frames, step=step, teacher=teacher, measured=measured)

    def _agreed(self, answer: list[int]) -> list[int]:
        """What rank 0 found, where all processes have to do the same; files come and go while they look."""
        if not self.together:
            return answer
        box = [answer]
        distributed.broadcast_object_list(box, src=0)
        return box[0]

    def _teacher_frames(self, index: int, *, writes: bool) -> Frames | None:
        """The teacher's video; sampled once in a run, by the process that the prompt belongs to."""
        if self.teacher is None:
            return None
        frames = self.files.load_teacher(index)
        if self._agreed([index] if frames is None else []):
            frames = self._sample(self.teacher, index)
            if writes:
                self.files.write_teacher(index, frames)
        return frames

    def _sample(self, model: nn.Module, index: int) -> Frames:
        """A prompt's video, uint8 [F, H, W, 3]; alone, so that it does not depend on how the prompts are shared out."""
        prompt, seed, negative = self.files.prompts[index], self.files.seeds[index], self.files.negatives[index]
        modes = [(module, module.training) for module in model.modules()]  # they need not be all alike
        try:
            with isolate_rng(), uncompiled(model), interruptible(model, together=self.together), self._shared(model):
                videos = generate_videos(
                    self.family, model, [prompt], [seed], negative_prompts=[negative], encode=self.encode
                )
        finally:
            for module, training in modes:
                module.training = training
        frames: Frames = videos[0].numpy()
        return frames

    def _shared(self, model: nn.Module) -> AbstractContextManager[None]:
        """What has calls of a model share their tokens out, where processes do; the first time a collective."""
        if self.context == 1:
            return nullcontext()
        if model not in self._sequences:
            device = sampling_device(next(model.parameters()).device)
            self._sequences[model] = SharedSequence([model], processes=self.context, device=device)
        return self._sequences[model].applied()

    def publish(self, loggers: list[Logger], *, step: int) -> None:
        """As rank 0: log every validation up to ``step`` whose files are all there, and bring the table up to date."""
        if step not in self._unlogged:
            self._unlogged.append(step)
        complete = {step for step in self._unlogged if not self.files.missing(step)}
        self._unlogged = [step for step in self._unlogged if step not in complete]
        for logger in loggers:
            if isinstance(logger, WandbRun):
                # A row of the history holds a panel once: that of its own step, or what came late in a row before.
                last = step if step in complete else step - 1
                for number, done in enumerate(sorted(complete), start=1 - len(complete)):
                    found = read_validation(self.files.directory, verify=False)
                    videos = [video for video in found if video.step == done]
                    row = max(0, last + number)
                    logger.attempt(partial(log_videos, files=self.files, videos=videos, row=row))
        self.files.write_table()

    def finish(self, loggers: list[Logger], *, world_size: int) -> None:
        """As rank 0: wait for the others' last videos, log what came, warn of what did not.

        A process writes its videos one after another: where its last ones are, earlier ones that are missing won't come.
        """
        if not self._unlogged:
            return
        last = self._unlogged[-1]
        deadline = time.monotonic() + self.wait_seconds
        while world_size > 1 and self.files.missing(last) and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
            stop_request.check()
        self.publish(loggers, step=last)
        for step in self._unlogged:
            names = ", ".join(str(path) for path in self.files.missing(step))
            log.warning("validation videos of step %d are missing, it is not logged: %s", step, names)


def validation_videos(
    run: TrainingRun, output: TrainingOutput, *, teacher: nn.Module | None, encode: Encode | None
) -> ValidationVideos | None:
    """The callback that a training asks for; None where it asks for none."""
    family, evaluation = run.model.family, output.evaluation
    if evaluation.video_every_steps is None or evaluation.videos == 0:
        return None
    shown, own = shown_videos(evaluation, family, seed=run.steps.seed), family.negative_prompt
    videos = ValidationVideos(
        files=ValidationFiles(
            output.run_dir / DIRECTORY,
            prompts=[video.caption for video in shown],
            seeds=[video.seed for video in shown],
            negatives=[own if video.negative is None else video.negative for video in shown],
            fps=family.fps,
        ),
        family=family,
        teacher=teacher,
        encode=encode,
        every_steps=evaluation.video_every_steps,
        num_steps=run.steps.num_steps,
        together=run.calls_together,
    )
    videos.metrics, videos.context = PairedMetrics(evaluation.suite), run.strategy.context_parallel
    return videos


def _distance(frames: Frames, teacher: Frames, device: torch.device) -> dict[str, float]:
    """PSNR in dB and SSIM of a video to the teacher's."""
    a, b = (torch.from_numpy(video).to(device) for video in (frames, teacher))
    return {"psnr_db": psnr_db(a, b, max_value=255), "ssim": ssim(a, b, max_value=255)}
