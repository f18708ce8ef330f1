"""The way of a run that quantizes, from the PTQ start to the report: what `train` and `ptq` do when it is no dry run."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import nn

from qvgen.config.processes import launched_world
from qvgen.config.schema.train import TrainConfig
from qvgen.cpu_threads import set_threads
from qvgen.evaluation.kept_samples import forget_samples
from qvgen.evaluation.placement import sampling_device
from qvgen.evaluation.report.writer import write_report
from qvgen.layers.attention_swap import quantized_attentions
from qvgen.layers.swap import SwapReport, quantized_layers
from qvgen.training.design.training_run import TrainingRun
from qvgen.training.distributed.ahead import LOG_FOLDER
from qvgen.training.distributed.launched_store import is_shared
from qvgen.training.distributed.meeting import MARK_FILE
from qvgen.training.identity import check_worker
from qvgen.training.session import train_share
from qvgen.training.shared_error import REFERENCE_FILE, SharedError, read_reference, write_reference
from qvgen.training.start.file import load_start
from qvgen.training.start.run_calibration import sample_share
from qvgen.training.start.shared import set_up_share
from qvgen.training.start.student import Measured, prepare_student, start_student
from qvgen.training.whole_run import (
    early_workers,
    processes_of,
    shared_outputs,
    sharing_queue,
    start_helpers,
    trained,
)
from qvgen.verbs._deliver import TrainingEnd, deliver, show_result
from qvgen.verbs._inputs import open_held_out, open_inputs
from qvgen.verbs._packed_only import deliver_unmeasured
from qvgen.verbs._parts import (
    claim,
    open_log,
    ptq_method,
    sampled_teacher,
    student_design,
    training_output,
    training_run,
)
from qvgen.verbs._sampling import help_sampling

log = logging.getLogger(__name__)


def quantize(config: TrainConfig) -> None:
    """From the PTQ start over training, if the method has any, to a packed checkpoint and a report."""
    log.debug("%s: weights %s", config.names.model, config.model.revision)  # raises where there are none
    inputs, design = open_inputs(config), student_design(config)
    student, swapped = prepare_student(config.model, design, seed=None)
    run = training_run(config)
    with (
        claim(config) as run_dir,
        open_log(config, run_dir.path) as loggers,
        early_workers(run, run_dir.path, settings=config.plain, hang_minutes=config.training.hang_minutes) as workers,
    ):
        _show_plan(config, student, swapped)
        teacher = config.model.load_teacher()
        held_out = inputs(teacher)
        measured = Measured(inputs=held_out, reference=list(held_out.predictions(teacher)))
        start = start_student(
            run_dir,
            student,
            design=design,
            ptq=ptq_method(config),
            teacher=sampled_teacher(config, teacher, encode=held_out.split.encode),
            measured=measured,
            helpers=start_helpers(run, run_dir.path, settings=config.plain, workers=workers),
        )
        outputs, training = None, nullcontext(0)
        if config.steps:
            outputs = shared_outputs(run, held_out)
            validate = _shared_measurement(config, run_dir.path, measured) if run.devices > 1 else measured.error
            training = trained(
                run,
                training_output(config, run_dir.path, validate=validate, outputs=outputs, loggers=loggers),
                student=student,
                teacher=teacher,
                settings=config.plain,
                hang_minutes=config.training.hang_minutes,
                workers=workers,
            )
        with training as steps:
            (run_dir.path / REFERENCE_FILE).unlink(missing_ok=True)
            if not held_out.num_samples:
                deliver_unmeasured(
                    config, run_dir.path, start=start, teacher=teacher, student=student, why=held_out.source
                )
                return
            data = deliver(
                config,
                run_dir.path,
                start=start,
                teacher=teacher,
                student=student,
                measured=measured,
                ended=TrainingEnd(
                    steps=steps,
                    queue=sharing_queue(run),
                    is_alone=run.is_sharded,
                    outputs=None if outputs is None else outputs.found,
                ),
            )
        show_result(data, write_report(run_dir.path, data))
        forget_samples(run_dir.path)


def set_up_layers(config: TrainConfig, *, rank: int) -> None:
    """Set up layers for the start as another process of a run than the one that the user started."""
    set_threads(config.strategy.threads)
    check_worker(config.run_dir, config.plain, family=config.model, method=config.method)
    set_up_share(
        config.run_dir,
        rank=rank,
        family=config.model,
        design=student_design(config),
        init=config.init,
        seed=config.seed,
        one_by_one=config.strategy.low_host_memory,
    )


def calibrate_share(config: TrainConfig, *, rank: int) -> None:
    """Take part in what is sampled for the start as another process of a run than the one that the user started."""
    set_threads(config.strategy.threads)
    world, cache = launched_world.current(), Path(config.calibration.cache).expanduser()
    if world is not None and world.node_rank and not is_shared(cache, like=config.run_dir / LOG_FOLDER / MARK_FILE):
        log.info("calibration.cache=%s is not the folder of rank 0's node: this node samples nothing", cache)
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(rank if world is None else world.local_rank)
    check_worker(config.run_dir, config.plain, family=config.model, method=config.method)
    encode = config.data.open(config.model, split="held_out").encode
    transformer = config.model.load_teacher()
    run = training_run(config)
    if run.is_sharded:  # its host has room for shares; what is mapped of the files is given back
        transformer.to(sampling_device())
    teacher = sampled_teacher(config, transformer, encode=encode)
    sample_share(ptq_method(config), profile=config.profile, teacher=teacher, num_processes=run.devices)
    log.info("the calibration is there")


def take_part(config: TrainConfig, *, rank: int, world_size: int, port: int) -> None:
    """Train as another process of a run than the one that the user started."""
    assert world_size == config.world_size, f"{world_size} processes for {config.world_size}"
    set_threads(config.strategy.threads)
    check_worker(config.run_dir, config.plain, family=config.model, method=config.method)
    run = training_run(config)
    processes, validate, outputs = processes_of(run, rank=rank, port=port), None, None
    if config.method.quantizes and config.evaluation.every_steps is not None:
        reference = None if config.strategy.low_host_memory else read_reference(config.run_dir)
        how = {"together": run.calls_together, "context": config.strategy.context_parallel}
        validate = SharedError(open_held_out(config), reference=reference, **how)
    if config.method.quantizes and run.is_sharded:
        outputs = shared_outputs(run, open_held_out(config))
    output = training_output(config, config.run_dir, validate=validate, outputs=outputs)
    if processes.sharded:  # its shares come from rank 0
        train_share(run, output, student=None, teacher=None, processes=processes)
        if config.method.quantizes and not config.strategy.low_host_memory:
            _help_at_the_end(config, run, student=None, teacher=None)
        return
    teacher: nn.Module | None = None
    if config.method.quantizes:
        student, _ = prepare_student(config.model, run.design, seed=None)
        if config.method.needs_teacher or config.evaluation.video_every_steps is not None:
            teacher = config.model.load_teacher()
    else:
        from qvgen.verbs._pretrain import full_precision_start

        student, teacher = full_precision_start(config)
    load_start(student, config.run_dir)
    train_share(run, output, student=student, teacher=teacher, processes=processes)
    if config.method.quantizes:
        _help_at_the_end(config, run, student=student, teacher=teacher)


def _help_at_the_end(
    config: TrainConfig, run: TrainingRun, *, student: nn.Module | None, teacher: nn.Module | None
) -> None:
    if (queue := sharing_queue(run)) is not None:
        help_sampling(config, student=student, teacher=teacher, queue=queue)


def _shared_measurement(config: TrainConfig, path: Path, measured: Measured) -> SharedError | None:
    """As rank 0, what measures a student on the way together with the other processes, which find the reference's file."""
    if config.evaluation.every_steps is None:
        return None
    write_reference(path, measured.reference, key=config.model.revision)
    how = {"together": training_run(config).calls_together, "context": config.strategy.context_parallel}
    return SharedError(measured.inputs, reference=measured.reference.__getitem__, **how)


def _show_plan(config: TrainConfig, student: nn.Module, swapped: SwapReport) -> None:
    layers = quantized_layers(student)
    weights = sum(layer.weight.numel() for layer in layers.values())
    log.info(
        "%s: %d Linears quantized to %s (%s), %d weights; skipped: %s",
        config.names.model, len(swapped.quantized), config.profile.label, config.profile.name, weights,
        ", ".join(swapped.skipped) or "none",
    )  # fmt: skip
    if (attention := config.profile.attention) is not None:
        log.info("attention in 8 bits (%s): %s", attention.kind, ", ".join(quantized_attentions(student)))
    for name in swapped.quantized:
        log.debug("quantized: %s", name)
    ranks = list(config.method.phi_ranks(config.phi))
    log.info(
        "%s from %s: %d steps of %d samples, Phi of ranks %s",
        config.names.method, config.names.init, config.steps, config.batch_size, ranks or "none",
    )  # fmt: skip
