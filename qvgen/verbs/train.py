"""Train a low-bit model: PTQ start, quantization-aware training, fold, pack, check, videos, report."""

from __future__ import annotations

import logging
from functools import partial

from torch import nn

from qvgen.config.processes import launched_world
from qvgen.config.processes.device_choice import say_chosen
from qvgen.config.schema.train import TrainConfig
from qvgen.cpu_threads import set_threads
from qvgen.deploy.kernel_choice import kernel_line
from qvgen.errors import DOES_NOT_FIT
from qvgen.evaluation.placement import sampling_device
from qvgen.training.design.meta_model import Prepared
from qvgen.training.distributed.context import check_run_context
from qvgen.training.distributed.zero_check import check_deepspeed
from qvgen.training.loss.prediction_loss import check_loss, freeze_the_rest_
from qvgen.training.optim.master_precision import check_masters
from qvgen.training.optim.optimizer import check_optimizer
from qvgen.training.planning.memory import MemoryCounter
from qvgen.training.planning.text import format_plan
from qvgen.training.planning.training_plan import plan_training
from qvgen.training.start.student_check import check_student
from qvgen.verbs import importing
from qvgen.verbs._checks import check_low_host_memory, check_sampling_parts
from qvgen.verbs._exports import check_exports, planned_exports, refuse_exports, write_exports
from qvgen.verbs._parts import ptq_method, student_design, title, training_run
from qvgen.verbs._shared_work import shared_work
from qvgen.verbs._strategy import settle_strategy

log = logging.getLogger(__name__)


def run(config: TrainConfig) -> int | None:
    """Do the whole way of one run.

    Returns:
        The exit code of a dry run that does not fit, or of a run with ``strategy=auto`` that fits nowhere; None otherwise.
    """
    if config.method.trains == "nothing":
        raise ValueError(f"method={config.names.method} trains nothing; use qvgen ptq with the same keys")
    set_threads(config.strategy.threads)
    if not config.dry_run:  # what trains is imported when something is: a plan takes a third of the seconds without
        from qvgen.training.tracking.service import check_wandb

        check_wandb(config.logger)
    if config.strategy.compile:
        from qvgen.training.blocks.compiled import check_compiler

        check_compiler()
    if not config.dry_run:
        check_optimizer(config.optim)
        check_deepspeed(config.strategy)
    if config.callbacks:
        _check_callbacks(config)
    config.data.check(config.model)
    check_loss(config.loss, method=config.method, name=config.names.method, family=config.model)
    if config.strategy.context_parallel > 1:
        samples = config.evaluation.video_every_steps is not None and config.evaluation.videos > 0
        check_run_context(training_run(config), samples=samples)
    if not config.method.quantizes:
        refuse_exports(config, why=f"method={config.names.method} quantizes nothing")
    if config.method.trains == "autoencoder":
        from qvgen.verbs._autoencoder import train_autoencoder

        train_autoencoder(config)
        return None
    if config.strategy.low_host_memory:
        check_low_host_memory(config)
    student = _checked_student(config) if config.method.quantizes else None
    config, counter, refusal = settle_strategy(config, student)
    if refusal is not None:
        return refusal
    if config.dry_run:
        say_chosen()
        return _print_plan(config, student, counter)
    del student, counter
    if config.strategy.low_host_memory:
        from qvgen.verbs._streamed import train_streamed

        train_streamed(config)
        return None
    if config.method.quantizes:
        with importing():
            from qvgen.verbs._quantize import quantize

        quantize(config)
        write_exports(config)
        return None
    from qvgen.verbs._pretrain import pretrain

    pretrain(config)
    return None


def _print_plan(config: TrainConfig, student: Prepared | None, counter: MemoryCounter | None) -> int | None:
    """Say what the run will do and take; the exit code where it does not fit."""
    run = training_run(config)
    plan = plan_training(
        run,
        device_memory_gib=config.device_memory_gib,
        run_dir=config.run_dir,
        checkpoints_kept=config.checkpoint.keep,
        num_clips=config.data.num_clips(),
        student=student,
        counter=counter,
    )
    world = launched_world.current()
    kernel = [] if student is None else [_kernel_line(student[0], config.kernel)]
    plan_lines = format_plan(plan, title=title(config), network_gbits=config.network_gbits)
    started = [] if world is None else [world.label]
    for line in [
        *started,
        *config.data.summary(),
        *plan_lines,
        *shared_work(config, run),
        *kernel,
        *planned_exports(config),
    ]:
        print(line)
    return None if plan.can_run else DOES_NOT_FIT


def _checked_student(config: TrainConfig) -> Prepared | None:
    """The student without weights, where no widths change while sampling; all that is known of it before a run is checked."""
    student = check_student(
        config.model,
        student_design(config),
        ptq_method(config),
        num_steps=config.steps,
        kernel=config.kernel,
        is_planned=config.dry_run,
    )
    check_exports(config, student)
    check_sampling_parts(config)
    if student is not None:
        freeze_the_rest_(student[0], method=config.method, optim=config.optim)
        check_masters(student[0], masters=config.optim.masters, gradients=config.optim.gradients)
    return student


def _kernel_line(student: nn.Module, kernel: str) -> str:
    return f"packed model, on this machine: {kernel_line(student, kernel=kernel, device=sampling_device())}"


def _check_callbacks(config: TrainConfig) -> None:
    """Raise UserError where a callback waits for what this run does not have."""
    from qvgen.training.callbacks.rules import check_monitors
    from qvgen.training.callbacks.steps import metric_columns

    schedule = config.method.schedule(config.phi, num_steps=config.steps)
    is_measured = config.method.quantizes and config.evaluation.every_steps is not None
    check_monitors(config.callbacks, columns=metric_columns(schedule)[1:], is_measured=is_measured)


def look_ahead(config: TrainConfig) -> None:
    """As another process of the run, raise for what this one does not see of the run's files, before rank 0 has begun.

    Raises:
        ValueError: The model or the clips are not there, or do not fit each other.
    """
    log.debug("%s: weights %s", config.names.model, config.model.revision)  # raises where there are none
    config.data.check(config.model)
    config.data.num_clips()


def help_start(config: TrainConfig, *, rank: int) -> None:
    """Set up layers for a start that rank 0 makes, as another process of the run, before :func:`run_worker`."""
    from qvgen.verbs._quantize import set_up_layers

    set_up_layers(config, rank=rank)


def help_calibration(config: TrainConfig, *, rank: int) -> None:
    """Sample for a start that rank 0 makes, as another process of the run, before :func:`help_start`."""
    from qvgen.verbs._quantize import calibrate_share

    calibrate_share(config, rank=rank)


def run_worker(config: TrainConfig, *, rank: int, world_size: int, port: int) -> None:
    """Take part in a run as another process than the one that the user started."""
    from qvgen.training.distributed.child import wait_for_group
    from qvgen.verbs._quantize import take_part

    if launched_world.current() is None:  # wait with everything imported, and help with the start where rank 0 asks
        helps = {"help_start": help_start, "help_calibration": help_calibration}
        wait_for_group(**{name: partial(help_with, config, rank=rank) for name, help_with in helps.items()})
    take_part(config, rank=rank, world_size=world_size, port=port)
