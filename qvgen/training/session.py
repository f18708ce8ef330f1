"""One training session: this process's share of a run, and the processes that share it.

All begin with the state that start_file.py wrote; a later session of the same run continues from the newest checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import lightning
import torch
from lightning.pytorch.loggers import Logger
from torch import nn

from qvgen import stop_request
from qvgen.config.schema import TrainConfig
from qvgen.data.datamodule import StepKeyedData
from qvgen.data.source import Split
from qvgen.methods.base import Schedule
from qvgen.run_directory import write_plain
from qvgen.training.callbacks import MethodSchedule, StepMetrics
from qvgen.training.checkpoint_file import CHECKPOINT_DIRECTORY, RunMark, check_checkpoint, run_key
from qvgen.training.checkpoint_writer import CheckpointWriter, checkpoints
from qvgen.training.distributed.heartbeat_callback import Heartbeat
from qvgen.training.distributed.launcher import WorkerGroup, worker_command
from qvgen.training.distributed.sharded_models import ShardedModels
from qvgen.training.micro_batch import micro_batches
from qvgen.training.module import VideoTraining
from qvgen.training.start_file import restore_layers_
from qvgen.training.trainer import Processes, build_trainer, fit
from qvgen.training.validation import validation_videos


def load_trained(student: nn.Module, run_dir: Path, *, schedule: Schedule | None) -> int:
    """Bring a prepared student to the newest checkpoint of a run, and to what the method's schedule says there.

    Returns:
        The optimizer step of that checkpoint.

    Raises:
        ValueError: There is no checkpoint, or it does not fit the student.
    """
    found = checkpoints(run_dir / CHECKPOINT_DIRECTORY)
    if not found:
        raise ValueError(f"{run_dir / CHECKPOINT_DIRECTORY} holds no checkpoint; train first")
    restore_layers_(student, run_dir)
    state = check_checkpoint(found[-1], run=run_key(run_dir))
    try:
        prefix = "student."
        student.load_state_dict(
            {name.removeprefix(prefix): value for name, value in state["state_dict"].items()}, strict=True
        )
    except (RuntimeError, KeyError, AttributeError) as error:
        raise ValueError(f"{found[-1]} is of another model ({type(error).__name__}); delete it") from error
    step = int(state["global_step"])
    if schedule is not None:
        schedule.apply_(student, None, step=step)
    return step


def train_all(
    config: TrainConfig,
    *,
    student: nn.Module,
    teacher: nn.Module | None,
    run_dir: Path,
    validate: Callable[[nn.Module], float] | None,
    loggers: Sequence[Logger] = (),
) -> None:
    """Train as rank 0, with as many other processes as the configuration asks for.

    Args:
        config: The run's.
        student: Holds the state that training starts from; holds the trained state afterwards.
        teacher: Full-precision model, if there is one: the method's target, and what validation videos stand beside.
        run_dir: A claimed run folder.
        validate: Measures the held-out relative error of the student.
        loggers: Where metrics go besides metrics.csv.

    Raises:
        UserError: The newest checkpoint is damaged, not finite or of another run.
    """
    if found := checkpoints(run_dir / CHECKPOINT_DIRECTORY):  # once, for all processes
        check_checkpoint(found[-1], run=run_key(run_dir))
    share = partial(
        train_share,
        config,
        student=student,
        teacher=teacher,
        run_dir=run_dir,
        validate=validate,
        loggers=loggers,
    )
    if config.devices == 1:
        share()
        return
    logs = run_dir / "logs"
    logs.mkdir(exist_ok=True)
    write_plain(logs / "worker.yaml", {**config.plain, "run_dir": str(run_dir)})
    with WorkerGroup(
        worker_command("train", logs / "worker.yaml", config.plain),
        world_size=config.devices,
        log_directory=logs,
        hang_minutes=config.training.hang_minutes,
    ) as group:
        share(processes=processes_of(config, rank=0, port=group.port))


def processes_of(config: TrainConfig, *, rank: int, port: int) -> Processes:
    """A run's processes, as one of them sees them."""
    return Processes(rank=rank, world_size=config.devices, port=port, sharded=config.strategy.name == "fsdp")


def train_share(
    config: TrainConfig,
    *,
    student: nn.Module | None,
    teacher: nn.Module | None,
    run_dir: Path,
    validate: Callable[[nn.Module], float] | None = None,
    processes: Processes | None = None,
    loggers: Sequence[Logger] = (),
) -> None:
    """Train as one of the run's processes; arguments as :func:`train_all`, no models on other ranks with strategy=fsdp."""
    torch.set_num_threads(config.strategy.threads)
    processes = processes or Processes()
    schedule = config.method.schedule(config.phi, num_steps=config.steps)
    split: Split = config.data.open(config.model, split="train")
    models = None
    trained, shown = student, teacher
    if processes.sharded:
        models = ShardedModels(config, whole_student=student, whole_teacher=teacher)
        trained, shown = models.student, models.teacher
        restore_layers_(trained, run_dir)
    assert trained is not None, "a process that trains a whole model needs it"
    module = VideoTraining(
        config,
        student=trained,
        teacher=shown if config.method.needs_teacher else None,
        encode=split.encode,
        share_out=None if models is None else models.share_out_,
    )
    callbacks = _callbacks(config, split, teacher=shown, run_dir=run_dir, validate=validate)
    trainer = build_trainer(
        steps=config.steps,
        accumulate=micro_batches(config),
        processes=processes,
        callbacks=callbacks,
        loggers=list(loggers),
    )
    data = StepKeyedData(split, batch_size=config.batch_size, accumulate=micro_batches(config), seed=config.seed)
    if config.strategy.gradient_checkpointing:
        trained.enable_gradient_checkpointing()  # type: ignore[operator] # every diffusers transformer has it
    trained.train()
    found = checkpoints(run_dir / CHECKPOINT_DIRECTORY)
    fit(trainer, module, data, checkpoint=found[-1] if found else None)
    stop_request.check()  # asked for in the last moments
    if models is not None:
        models.gather_()
    if student is not None:
        if schedule is not None:  # what the last step annealed to 0, where there is no tail
            schedule.apply_(student, None, step=config.steps)
        config.method.finish_(student)
        student.eval()


def _callbacks(
    config: TrainConfig,
    split: Split,
    *,
    teacher: nn.Module | None,
    run_dir: Path,
    validate: Callable[[nn.Module], float] | None,
) -> list[lightning.Callback]:
    """In their order: signs of life; the method's schedule, before the step; metrics, checkpoint and videos, after it."""
    schedule, steps = config.method.schedule(config.phi, num_steps=config.steps), config.steps
    callbacks: list[lightning.Callback] = [Heartbeat()]
    if schedule is not None:
        callbacks.append(MethodSchedule(schedule))
    videos = validation_videos(config, run_dir=run_dir, teacher=teacher, encode=split.encode)
    callbacks += [
        StepMetrics(
            run_dir / "metrics.csv",
            schedule=schedule,
            validate=validate,
            every_steps=config.evaluation.every_steps,
            num_steps=steps,
            sharded=config.strategy.name == "fsdp",
        ),
        RunMark(run_dir),
        CheckpointWriter(
            run_dir / CHECKPOINT_DIRECTORY,
            config=config.checkpoint,
            num_steps=steps,
            before=lambda step: videos is not None and config.strategy.name == "ddp" and videos.is_due(step),
        ),
    ]
    return callbacks if videos is None else [*callbacks, videos]
