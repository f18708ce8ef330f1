"""A run's configuration, taken apart: what each part of the library needs of it. Configurations go no further than this."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from qvgen.config.processes.device_choice import say_chosen
from qvgen.config.schema.train import TrainConfig
from qvgen.initializers.base import Need
from qvgen.models.base import Encode
from qvgen.models.named_family import NamedFamily
from qvgen.training.design.micro_batch import StepBatch
from qvgen.training.design.student import StudentDesign
from qvgen.training.design.training_run import TrainingOutput, TrainingRun
from qvgen.training.design.training_steps import TrainingSteps
from qvgen.training.run_label import RunLabel
from qvgen.training.start.ptq_method import PTQMethod

if TYPE_CHECKING:
    from lightning.pytorch.loggers import Logger

    from qvgen.evaluation.sampled_teacher import SampledTeacher
    from qvgen.run_directory import RunDirectory
    from qvgen.training.shared_error import SharedOutputs


def named_family(config: TrainConfig) -> NamedFamily:
    """The model."""
    return NamedFamily(name=config.names.model, family=config.model, section=config.plain["model"])


def student_design(config: TrainConfig) -> StudentDesign:
    """The student's layers."""
    return StudentDesign(
        profile=config.profile,
        method=config.method,
        phi=config.phi,
        activation_switch=config.activation_switch,
        zero_point_gradient=config.optim.zero_point_gradient,
    )


def step_batch(config: TrainConfig) -> StepBatch:
    """The samples of an optimizer step."""
    context = config.strategy.context_parallel
    return StepBatch(size=config.batch_size, accumulate=config.accumulate, devices=config.world_size, context=context)


def training_steps(config: TrainConfig) -> TrainingSteps:
    """The optimizer steps."""
    return TrainingSteps(
        num_steps=config.steps, batch=step_batch(config), optim=config.optim, loss=config.loss, seed=config.seed
    )


def training_run(config: TrainConfig) -> TrainingRun:
    """The training."""
    return TrainingRun(
        model=named_family(config),
        design=student_design(config),
        steps=training_steps(config),
        strategy=config.strategy,
        ema=config.ema,
        data=config.data,
        num_nodes=config.num_nodes,
    )


def training_output(
    config: TrainConfig,
    run_dir: Path,
    *,
    validate: Callable[[nn.Module], float] | None = None,
    outputs: SharedOutputs | None = None,
    loggers: Sequence[Logger] = (),
) -> TrainingOutput:
    """What the training leaves in a folder; see :class:`TrainingOutput`."""
    return TrainingOutput(
        run_dir=run_dir,
        checkpoint=config.checkpoint,
        evaluation=config.evaluation,
        validate=validate,
        outputs=outputs,
        loggers=loggers,
        trainer=config.trainer,
        callbacks=config.callbacks,
    )


def ptq_method(config: TrainConfig) -> PTQMethod:
    """The PTQ method that the run starts from; its calibration takes the evaluation's prompts where it has none."""
    prompts = config.calibration.prompts or config.evaluation.prompts
    return PTQMethod(name=config.names.init, init=config.init, calibration=replace(config.calibration, prompts=prompts))


def sampled_needs(config: TrainConfig) -> frozenset[Need | Literal["attention"]]:
    """What the run samples of the full-precision model for its PTQ start; empty: nothing."""
    attention: frozenset[Literal["attention"]] = frozenset()
    if config.profile.attention is not None and config.profile.attention.is_searched:
        attention = frozenset({"attention"})
    return ptq_method(config).needs(config.profile) | attention


def sampled_teacher(config: TrainConfig, transformer: nn.Module, *, encode: Encode) -> SampledTeacher:
    """The full-precision model as calibration and measurements see it."""
    from qvgen.evaluation.sampled_teacher import SampledTeacher

    return SampledTeacher(model=named_family(config), transformer=transformer, encode=encode, seed=config.seed)


def claim(config: TrainConfig) -> RunDirectory:
    """Take the run's folder; see :func:`qvgen.training.identity.claim_run`."""
    from qvgen.training.identity import claim_run

    run_dir = claim_run(config.run_dir, config.plain, facts=lambda: run_facts(config), resume=config.resume)
    say_chosen()
    return run_dir


def run_facts(config: TrainConfig) -> dict[str, str]:
    """All that the run's numbers depend on; see :func:`qvgen.training.identity.collect_facts`."""
    from qvgen.training.identity import collect_facts

    reads_data = config.evaluation.samples > 0 and config.data.is_given  # `qvgen ptq` may read none
    return collect_facts(
        config.plain,
        family=config.model,
        method=config.method,
        data=config.data if reads_data else None,
        prompts=_sampled_prompts(config),
    )


def _sampled_prompts(config: TrainConfig) -> dict[str, Sequence[Any]]:
    """What the run samples, by use."""
    from qvgen.evaluation.prompts import calibration_prompts, shown_videos

    if not config.method.quantizes:
        return {}
    prompts: dict[str, Sequence[Any]] = {"shown": shown_videos(config.evaluation, config.model, seed=config.seed)}
    if sampled_needs(config):
        prompts["calibration"] = calibration_prompts(ptq_method(config).calibration, config.model).lines
    return prompts


def open_log(config: TrainConfig, run_dir: Path) -> AbstractContextManager[list[Logger]]:
    """The loggers of a run besides metrics.csv, while a block trains and reports; none where nothing is trained."""
    from qvgen.training.tracking.wandb_run import training_log

    return training_log(config.logger, run_dir, run_label(config)) if config.steps else nullcontext([])


def run_label(config: TrainConfig) -> RunLabel:
    """What a logging service is told of the run."""
    names, bits, kept = config.names, config.bits.label, student_design(config).phi_kept_rank
    return RunLabel(
        name=f"{names.model}-{bits}-{names.method} {names.init}{f' phi kept {kept}' if kept else ''} seed {config.seed}",
        tags=(names.model, f"bits={bits}", names.method, names.init, names.profile, *(["phi kept"] if kept else [])),
        settings=config.plain,
    )


def packed_record(config: TrainConfig, *, steps: int) -> dict[str, Any]:
    """What a packed directory's manifest says of how it was made."""
    names = config.names
    return {
        "method": names.method,
        "init": names.init,
        "bits": config.bits.label,
        "seed": config.seed,
        "steps": steps,
    }


def title(config: TrainConfig) -> str:
    """The run in words, for a plan."""
    names = config.names
    return (
        f"model={names.model} bits={config.bits.label} profile={names.profile} method={names.method} init={names.init} "
        f"data={names.data} strategy={config.strategy.name}"
    )
