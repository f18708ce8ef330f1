"""The parts of the library, called with the parts of a run's configuration as the verbs call them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from qvgen.config import TrainConfig
from qvgen.evaluation.mixed_precision_files import Allocation
from qvgen.layers.swap import SwapReport
from qvgen.models.base import Encode
from qvgen.training.calibration.statistics import CalibratedModel
from qvgen.training.callbacks.validation import ValidationVideos, validation_videos
from qvgen.training.design.meta_model import Prepared, build_student
from qvgen.training.module import VideoTraining
from qvgen.training.planning.counted_step import StepSettings, count_blocks
from qvgen.training.planning.operation_counter import StepCount
from qvgen.training.planning.training_plan import TrainingPlan, plan_training
from qvgen.training.start.run_calibration import calibrate_
from qvgen.training.start.student import prepare_student
from qvgen.training.start.student_check import check_student
from qvgen.verbs._parts import (
    named_family,
    ptq_method,
    sampled_teacher,
    student_design,
    training_output,
    training_run,
)

NUM_BANDS = 50


def prepared(config: TrainConfig) -> tuple[nn.Module, SwapReport]:
    """The run's student, and what of it is quantized."""
    return prepare_student(config.model, student_design(config), seed=config.seed)


def planned_student(config: TrainConfig) -> Prepared:
    """The run's student on the meta device."""
    return build_student(named_family(config).rebuild(), student_design(config))


def checked_student(config: TrainConfig) -> Prepared | None:
    """The run's student on the meta device, everything about it checked."""
    return check_student(
        config.model, student_design(config), ptq_method(config), num_steps=config.steps, kernel=config.kernel
    )


def planned(config: TrainConfig, **further: Any) -> TrainingPlan:
    """The run's plan."""
    return plan_training(
        training_run(config),
        device_memory_gib=config.device_memory_gib,
        run_dir=config.run_dir,
        checkpoints_kept=config.checkpoint.keep,
        **further,
    )


def counted(config: TrainConfig, settings: StepSettings, *, blocks: int, is_fake: bool = False) -> StepCount:
    """Operations and bytes of one of the run's micro-batches."""
    return count_blocks(
        named_family(config), student_design(config), settings, optim=config.optim, blocks=blocks, is_fake=is_fake
    )


def training_module(
    config: TrainConfig,
    *,
    student: nn.Module,
    teacher: nn.Module | None,
    encode: Encode,
    validate: Callable[[nn.Module], float] | None = None,
    validate_every_steps: int | None = None,
    share_out: Callable[..., None] | None = None,
) -> VideoTraining:
    """The module that trains the run's student."""
    return VideoTraining(
        training_run(config),
        student=student,
        teacher=teacher,
        encode=encode,
        validate=validate,
        validate_every_steps=validate_every_steps,
        share_out=share_out,
    )


def calibrated_model(
    config: TrainConfig, *, teacher: nn.Module, encode: Encode, num_bands: int = NUM_BANDS
) -> CalibratedModel:
    """The statistics that the run's PTQ method gets."""
    ptq = ptq_method(config)
    sampled = sampled_teacher(config, teacher, encode=encode)
    return CalibratedModel(sampled, ptq.calibration, needs=ptq.needs(config.profile), num_bands=num_bands)


def calibrated(
    config: TrainConfig, student: nn.Module, *, teacher: nn.Module, encode: Encode
) -> tuple[CalibratedModel | None, Allocation | None]:
    """What the run's PTQ method gets to know, its student's layers with their bits."""
    sampled = sampled_teacher(config, teacher, encode=encode)
    return calibrate_(student, ptq_method(config), profile=config.profile, teacher=sampled)


def video_callback(
    config: TrainConfig, *, run_dir: Any, teacher: nn.Module | None, encode: Encode | None
) -> ValidationVideos | None:
    """The callback that samples the run's validation videos."""
    output = training_output(config, run_dir)
    return validation_videos(training_run(config), output, teacher=teacher, encode=encode)
