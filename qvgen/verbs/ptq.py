"""Make a low-bit model by a PTQ method alone: calibration if it needs any, fold, pack, check, videos, report."""

from __future__ import annotations

from qvgen.config.schema.train import TrainConfig
from qvgen.cpu_threads import set_threads
from qvgen.evaluation.prompts import calibration_prompts
from qvgen.initializers.bit_budget import BitBudget
from qvgen.models.few_step import sampling_steps
from qvgen.training.start.student_check import check_student
from qvgen.verbs._checks import check_sampling_parts, without_clips
from qvgen.verbs._exports import check_exports, planned_exports, write_exports
from qvgen.verbs._parts import ptq_method, sampled_needs, student_design


def run(config: TrainConfig) -> None:
    """Do what `qvgen train` does, without its training."""
    if config.method.trains != "nothing" or config.steps:
        raise ValueError(
            f"method={config.names.method} steps={config.steps}: qvgen ptq trains nothing; use qvgen train"
        )
    set_threads(config.strategy.threads)
    config.data.check(config.model)
    ptq = ptq_method(config)
    student = check_student(
        config.model,
        student_design(config),
        ptq,
        num_steps=config.steps,
        kernel=config.kernel,
        is_planned=config.dry_run,
    )
    check_exports(config, student)
    check_sampling_parts(config)
    prompts = calibration_prompts(ptq.calibration, config.model) if sampled_needs(config) else []
    if config.dry_run:
        for line in plan(config, num_prompts=len(prompts)):
            print(line)
        return
    from qvgen.verbs._quantize import quantize  # with all that trains

    quantize(config)
    write_exports(config)


def plan(config: TrainConfig, *, num_prompts: int) -> list[str]:
    """What the verb would do; ``num_prompts`` are those of the calibration."""
    needs = ", ".join(sorted(sampled_needs(config)))
    calibration = config.calibration
    steps = sampling_steps(config.model, calibration.steps, needs=sampled_needs(config))
    return [
        f"model={config.names.model} init={config.names.init} {config.profile.label} ({config.profile.name}), no training",
        f"calibration: {needs} from {calibration.videos} videos of {steps} steps, {num_prompts} prompts"
        if needs
        else "calibration: none, nothing is sampled",
        *_measurements(config),
        f"measured on: {_measured_on(config)}",
        *config.data.summary(),
        f"output: {config.run_dir}",
        *planned_exports(config),
    ]


def _measurements(config: TrainConfig) -> list[str]:
    if not isinstance(config.init, BitBudget):
        return []
    from qvgen.training.mixed_precision.allocation import plan_measurements  # with its metrics

    return [plan_measurements(config.init, profile=config.profile, family=config.model)]


def _measured_on(config: TrainConfig) -> str:
    if config.evaluation.samples == 0:
        return "nothing (evaluation.samples=0): no errors, no videos"
    if without_clips(config):
        return f"{config.evaluation.samples} inputs of the full-precision model's own sampling (no data.path)"
    return f"{config.evaluation.samples} held-out inputs of data={config.names.data}"
