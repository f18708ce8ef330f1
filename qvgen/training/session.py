"""One training session: this process's share of a run.

All begin with the state that start/file.py wrote; a later session of the same run continues from the newest checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning
import torch
from torch import nn

from qvgen import stop_request
from qvgen.cpu_threads import set_threads
from qvgen.data.datamodule import MeasuredData
from qvgen.data.source import Split
from qvgen.errors import is_ours
from qvgen.layers.integer_product import set_int8_products
from qvgen.methods.base import Schedule
from qvgen.training.blocks.checkpointing import block_checkpoint
from qvgen.training.blocks.compiled import compile_blocks_, release_blocks_
from qvgen.training.callbacks.average import AVERAGE_KEY, Average
from qvgen.training.callbacks.layer_metrics import LayerMetrics
from qvgen.training.callbacks.rules import CallbackRules, first_end
from qvgen.training.callbacks.steps import MethodSchedule, StepMetrics
from qvgen.training.callbacks.validation import validation_videos
from qvgen.training.checkpoint.file import CHECKPOINT_DIRECTORY, RunMark, check_checkpoint, run_key
from qvgen.training.checkpoint.saved_tensor import load_tensors_
from qvgen.training.checkpoint_writer import CheckpointWriter, checkpoints
from qvgen.training.design.training_run import TrainingOutput, TrainingRun
from qvgen.training.distributed.gathering import Gathering
from qvgen.training.distributed.heartbeat_callback import Heartbeat
from qvgen.training.distributed.pace import PaceCallback
from qvgen.training.distributed.sharded_models import ShardedModels, WholeModels, uses_teacher
from qvgen.training.freed_memory import keep_freed_memory
from qvgen.training.module import VideoTraining
from qvgen.training.optim.master_precision import widen_masters_
from qvgen.training.shared_error import SharedError
from qvgen.training.start.file import START_FILE, restore_layers_
from qvgen.training.step_figures import StepFigures, speed_of
from qvgen.training.stop_point import interruptible
from qvgen.training.trainer import (
    Processes,
    build_trainer,
    fit,
    restored_settings,
    trainer_arguments,
)


def load_trained(student: nn.Module, run_dir: Path, *, schedule: Schedule | None, averaged: bool = False) -> int:
    """Bring a prepared student to the newest checkpoint of a run, and to what the method's schedule says there.

    Args:
        student: Prepared.
        run_dir: The run's folder.
        schedule: The method's.
        averaged: Take the average that the checkpoint holds in place of the student itself.

    Returns:
        The optimizer step of that checkpoint.

    Raises:
        ValueError: There is no checkpoint, or it does not fit the student.
    """
    newest = newest_checkpoint(run_dir)
    restore_layers_(student, run_dir)
    with of_this_model(newest):
        step, trained, average = read_trained(newest, run_dir, averaged=averaged)
        load_tensors_(student, trained)
        # After the student's own: tensors that layers share have several names there and one here.
        load_tensors_(student, average, strict=False)
    if schedule is not None:
        schedule.apply_(student, None, step=step)
    return step


def newest_checkpoint(run_dir: Path) -> Path:
    """The newest checkpoint of a run; raises ValueError where there is none."""
    if found := checkpoints(run_dir / CHECKPOINT_DIRECTORY):
        return found[-1]
    raise ValueError(f"{run_dir / CHECKPOINT_DIRECTORY} holds no checkpoint; train first")


@contextmanager
def of_this_model(path: Path) -> Iterator[None]:
    """Say of which checkpoint it is that it does not fit the student."""
    try:
        yield
    except (RuntimeError, KeyError, AttributeError) as error:
        if isinstance(error, RuntimeError) and is_ours(error):
            raise
        raise ValueError(f"{path} is of another model ({type(error).__name__}); delete it") from error


def read_trained(path: Path, run_dir: Path, *, averaged: bool) -> tuple[int, dict[str, Any], dict[str, Any]]:
    """A checkpoint's step, the student's tensors by name, and those of its average, none unless they are asked for.

    Raises:
        ValueError: It is damaged, not finite, or of another run.
    """
    wanted = ("state_dict", AVERAGE_KEY) if averaged else ("state_dict",)
    state = check_checkpoint(path, run=run_key(run_dir), only=wanted)
    trained = {name.removeprefix("student."): value for name, value in state["state_dict"].items()}
    return int(state["global_step"]), trained, dict(state[AVERAGE_KEY]) if averaged else {}


def train_share(
    run: TrainingRun,
    output: TrainingOutput,
    *,
    student: nn.Module | None,
    teacher: nn.Module | None,
    processes: Processes | None = None,
) -> int:
    """Train as one of the run's processes; arguments as in whole_run.py, no models on other ranks where they are sharded.

    Returns:
        The optimizer step that training ended with.
    """
    set_threads(run.strategy.threads)
    set_int8_products(run.strategy.int8_products)
    if not torch.cuda.is_available():
        keep_freed_memory()
    processes = replace(processes or Processes(), shares_on_host=run.strategy.cpu_offload)
    family, method, steps, run_dir = run.model.family, run.design.method, run.steps, output.run_dir
    schedule = run.design.schedule(steps.num_steps)
    if run.data is None:
        raise ValueError("a training needs data; give TrainingRun(data=...), which only a plan can do without")
    split: Split = run.data.open(family, split="train")
    models = None
    trained, shown = student, teacher
    if processes.sharded:
        has_teacher = uses_teacher(method, shows_videos=output.evaluation.video_every_steps is not None)
        models = ShardedModels(
            family,
            run.design,
            has_teacher=has_teacher,
            whole=None if run.strategy.low_host_memory else WholeModels(student=student, teacher=teacher),
            start=run_dir / START_FILE,
            how=Gathering.of(run.strategy),
        )
        trained, shown = models.student, models.teacher
        if shown is not None and isinstance(output.validate, SharedError):
            output.validate.take_reference_of(shown)
        restore_layers_(trained, run_dir)
    assert trained is not None, "a process that trains a whole model needs it"
    step = _fit(run, output, split, student=trained, teacher=shown, processes=processes, models=models)
    stop_request.check()  # asked for in the last moments
    if models is not None:
        models.gather_()
        if output.outputs is not None:
            if schedule is not None:
                schedule.apply_(models.student, None, step=step)
            with interruptible(models.student, together=True):
                output.outputs.compute(models.student)
    if student is not None:
        if schedule is not None:  # what the last step annealed to 0, where there is no tail
            schedule.apply_(student, None, step=step)
        method.finish_(student)
        student.eval()
    return step


def _fit(
    run: TrainingRun,
    output: TrainingOutput,
    split: Split,
    *,
    student: nn.Module,
    teacher: nn.Module | None,
    processes: Processes,
    models: ShardedModels | None,
) -> int:
    """Run a trainer from the newest checkpoint; the optimizer step that it ended with."""
    method, steps = run.design.method, run.steps
    measured_every = output.evaluation.every_steps if method.quantizes else None
    module = VideoTraining(
        run,
        student=student,
        teacher=teacher if method.needs_teacher else None,
        encode=split.encode,
        validate=output.validate,
        validate_every_steps=measured_every,
        share_out=None if models is None else models.share_out_,
    )
    accumulate = steps.batch.num_micro_batches
    data = MeasuredData(
        split, batch_size=steps.batch.size, accumulate=accumulate, seed=steps.seed, context=steps.batch.context
    )
    if run.strategy.gradient_checkpointing:
        how = block_checkpoint(keep_attention=run.strategy.keep_attention)
        student.enable_gradient_checkpointing(how)  # type: ignore[operator] # every diffusers transformer has it
    if run.strategy.compile:
        compile_blocks_(student)
    student.train()
    average = _average(run)
    found = checkpoints(output.run_dir / CHECKPOINT_DIRECTORY)
    with restored_settings():
        trainer = build_trainer(
            steps=steps.num_steps,
            accumulate=accumulate,
            processes=processes,
            callbacks=_callbacks(run, output, split, teacher=teacher, average=average, is_first=processes.rank == 0),
            loggers=list(output.loggers),
            options=trainer_arguments(output.trainer, gradient_clip=steps.optim.gradient_clip, run_dir=output.run_dir),
            measured=measured_every is not None,
        )
        try:
            fit(trainer, module, data, checkpoint=found[-1] if found else None)
        finally:
            release_blocks_(student)
    widen_masters_(student)
    if average is not None and run.ema.fold:
        average.write_(student)
    return trainer.global_step


def _average(run: TrainingRun) -> Average | None:
    """What keeps the student's average, where there is to be one."""
    schedule = run.design.schedule(run.steps.num_steps)
    if run.ema.decay is None:
        return None
    return Average(run.ema, begins=[step for _, step in (() if schedule is None else schedule.phases)])


def _callbacks(
    run: TrainingRun,
    output: TrainingOutput,
    split: Split,
    *,
    teacher: nn.Module | None,
    average: Average | None,
    is_first: bool,
) -> list[lightning.Callback]:
    """In order: signs of life; the method's schedule, before the step; average; metrics, pace; the user's; files."""
    num_steps, run_dir = run.steps.num_steps, output.run_dir
    is_ddp = run.devices > 1 and not run.is_sharded
    schedule = run.design.schedule(num_steps)
    callbacks: list[lightning.Callback] = [Heartbeat()]
    if schedule is not None:
        callbacks.append(MethodSchedule(schedule))
    if average is not None:
        callbacks.append(average)
    videos = validation_videos(run, output, teacher=teacher, encode=split.encode)
    callbacks += [
        StepMetrics(
            run_dir / "metrics.csv",
            schedule=schedule,
            num_steps=num_steps,
            figures=StepFigures(speed_of(run, is_first=is_first)),
        ),
        *([PaceCallback()] if is_ddp else []),
        LayerMetrics(run_dir, num_steps=num_steps),
        *output.callbacks,
        CallbackRules(
            output.callbacks,
            first_step=first_end(
                schedule,
                num_steps=num_steps,
                min_steps=output.trainer.min_steps,
                phi_keep=run.design.phi_keep,
            ),
        ),
        RunMark(run_dir),
        CheckpointWriter(
            run_dir / CHECKPOINT_DIRECTORY,
            config=output.checkpoint,
            num_steps=num_steps,
            before=lambda step: videos is not None and is_ddp and videos.is_due(step),
        ),
    ]
    return callbacks if videos is None else [*callbacks, videos]
