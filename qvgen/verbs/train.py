"""Train a low-bit model: PTQ start, quantization-aware training, fold, pack, check, videos, report."""

from __future__ import annotations

import copy
import logging
import shlex
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from qvgen.config.leaves import load_leaf
from qvgen.config.schema import TrainConfig
from qvgen.deploy.checkpoint import check_kernel, load_packed, save_packed
from qvgen.deploy.manifest import WEIGHTS_FILE, read_manifest
from qvgen.evaluation.classifier import CLASSIFIER_FILE, dataset_accuracy, train_classifier
from qvgen.evaluation.comparison import bf16_bytes, compare_models, layer_reports
from qvgen.evaluation.environment import collect_environment
from qvgen.evaluation.held_out import HeldOut
from qvgen.evaluation.report import write_report
from qvgen.evaluation.report_data import HeldOutError, ModelSize, ReportData, RunInfo, SkippedLayer
from qvgen.evaluation.teacher import NUM_VIDEOS, teacher_quality
from qvgen.initializers.prepare import PrepareConfig, initialize_, prepare
from qvgen.layers.swap import SwapReport, fold, phi_suspended, quantized_layers
from qvgen.models.tiny import TEACHER_FILE
from qvgen.models.weight_file import save_weights
from qvgen.run_directory import RunDirectory
from qvgen.training.callbacks import total_seconds
from qvgen.training.session import (
    TRAINING_THREADS,
    decay_schedule,
    load_start,
    phi_ranks,
    save_start,
    train_all,
    train_share,
    use_threads,
)

log = logging.getLogger(__name__)

CLASSIFIER_STEPS = 600
LOCAL_ARGUMENTS = ("_target_", "recipe", "weights", "path")
"""Keys of conf/model that say nothing about the model, or where something lies on this machine."""


def run(config: TrainConfig) -> None:
    """Do the whole way of one run."""
    use_threads(TRAINING_THREADS)
    _check_inputs(config)
    if not config.method.quantizes:
        pretrain(config)
        return
    teacher = config.model.load_teacher()
    student, swapped = prepare_student(config, teacher)
    check_kernel(student, kernel=config.kernel)
    held_out = HeldOut(
        config.model, config.data(split="held_out"), num_samples=config.evaluation.samples, seed=config.seed
    )
    if config.dry_run:
        _show_plan(config, student, swapped)
        return
    with RunDirectory.claim(config.run_dir, config.plain, resume=config.resume) as run_dir:
        _show_plan(config, student, swapped)
        reference = list(held_out.predictions(teacher))
        start = _start(config, run_dir, student=student, held_out=held_out, reference=reference)
        train_all(
            config,
            student=student,
            teacher=teacher if config.method.target == "teacher" else None,
            run_dir=run_dir.path,
            validate=lambda model: held_out.relative_error(model, reference),
        )
        data = _deliver(config, run_dir.path, start=start, teacher=teacher, student=student, held_out=held_out)
        _show_result(data, write_report(run_dir.path, data))


def _deliver(
    config: TrainConfig,
    path: Path,
    *,
    start: Mapping[str, float],
    teacher: nn.Module,
    student: nn.Module,
    held_out: HeldOut,
) -> ReportData:
    """Fold, pack, read back, generate with all three models and compare: all that the report says."""
    seconds = {"init": start["seconds"], "train": total_seconds(path / "metrics.csv")}
    with _timed(seconds, "fold"):
        fold_student(config, student, path / "packed", steps=config.steps)
        packed = load_packed(path / "packed", kernel=config.kernel)  # as a user would
    with _timed(seconds, "generate"):
        comparison = compare_models(
            config, teacher=teacher, fake=student, packed=packed, held_out=held_out, run_dir=path
        )
    reference = list(held_out.predictions(teacher))
    return ReportData(
        run=_run_info(config),
        relative_error=HeldOutError(
            rtn=start["rtn"],
            ptq=start["ptq"],
            qat=held_out.relative_error(student, reference),
            packed=held_out.relative_error(packed, reference),
            num_samples=held_out.num_samples,
            split="held_out",
            seed=config.seed,
        ),
        size=ModelSize(bf16=bf16_bytes(teacher), packed=(path / "packed" / WEIGHTS_FILE).stat().st_size),
        checks=comparison.checks,
        videos=comparison.videos,
        quality=comparison.quality,
        layers=layer_reports(packed),
        skipped=tuple(
            SkippedLayer(name=name, reason="excluded by the model's patterns")
            for name in read_manifest(path / "packed").skipped
        ),
        seconds=seconds,
        environment=collect_environment(),
    )


def _check_inputs(config: TrainConfig) -> None:
    """Raise ValueError for what would only be noticed after the run's folder was made, or hours later."""
    if config.method.quantizes:
        log.debug("%s: weights %s", config.names.model, config.model.revision)  # raises where there are none
    data = config.data(split="train")
    if config.batch_size > len(data):
        raise ValueError(f"batch_size={config.batch_size} is larger than the training data of {len(data)}; use less")
    found, wanted = tuple(data[0]["video"].shape), config.model.sample_shape
    if found != wanted:
        raise ValueError(
            f"data={config.names.data} has videos of shape {found}, model={config.names.model} takes {wanted}; "
            "choose data that fits (training from cached latents of real clips is not there yet)"
        )
    config.model.encode(list(config.evaluation.prompts or config.model.prompts))


def pretrain(config: TrainConfig) -> None:
    """Train a full-precision model from scratch, and write its weights with a card that says how good it is.

    What is made is made in the run's folder; shipping it is moving it to where ``model.weights`` points.
    """
    student = config.model.initial_transformer(config.seed)
    train_split, held_out_split = config.data(split="train"), config.data(split="held_out")
    held_out = HeldOut(config.model, held_out_split, num_samples=config.evaluation.samples, seed=config.seed)
    log.info("%s: %d parameters", config.names.model, sum(p.numel() for p in student.parameters()))
    if config.dry_run:
        return
    with RunDirectory.claim(config.run_dir, config.plain, resume=config.resume) as run_dir:
        if run_dir.load_stage("start") is None:
            save_start(student, run_dir.path)
            run_dir.save_stage("start", {})
        load_start(student, run_dir.path)
        train_all(config, student=student, teacher=None, run_dir=run_dir.path, validate=None)
        card: dict[str, Any] = {
            "command": _command(),
            "seed": config.seed,
            "steps": config.steps,
            "seconds": round(total_seconds(run_dir.path / "metrics.csv")),
            "environment": {"machine": collect_environment().machine.to_json_dict()},
        }
        classifier = train_classifier(train_split, steps=CLASSIFIER_STEPS, seed=config.seed)
        accuracy = dataset_accuracy(classifier, held_out_split, count=NUM_VIDEOS)
        save_weights(
            classifier.state_dict(), run_dir.path / CLASSIFIER_FILE, card={**card, "held_out_accuracy": accuracy}
        )
        quality = teacher_quality(config.model, student, held_out_split, held_out=held_out, classifier=classifier)
        path = save_weights(student.state_dict(), run_dir.path / TEACHER_FILE, card={**card, "quality": quality})
    print(f"weights: {path}")
    for name, value in quality.items():
        print(f"{name}: {value:.4f}")


def run_worker(config: TrainConfig, *, rank: int, world_size: int, port: int) -> None:
    """Take part in a run as another process than the one that the user started."""
    assert world_size == config.devices, f"{world_size} processes for devices={config.devices}"
    teacher = None
    if config.method.quantizes:
        full_precision = config.model.load_teacher()
        student, _ = prepare_student(config, full_precision)
        teacher = full_precision if config.method.target == "teacher" else None
    else:
        student = config.model.initial_transformer(config.seed)
    load_start(student, config.run_dir)
    train_share(config, student=student, teacher=teacher, run_dir=config.run_dir, rank=rank, port=port)


def prepare_student(config: TrainConfig, teacher: nn.Module) -> tuple[nn.Module, SwapReport]:
    """A copy of the teacher with quantized layers, their scales by round-to-nearest."""
    decay_schedule(config)  # refuse an impossible plan before anything is computed
    student = copy.deepcopy(teacher).requires_grad_(True)
    swapped = prepare(
        student,
        PrepareConfig(
            profile=config.profile,
            initializer=load_leaf("init", "rtn"),
            include=config.model.include,
            exclude=config.model.exclude,
            phi_rank=max(phi_ranks(config), default=0),
            seed=config.seed,
        ),
    )
    return student, swapped


def _start(
    config: TrainConfig, run_dir: RunDirectory, *, student: nn.Module, held_out: HeldOut, reference: list[Any]
) -> Mapping[str, float]:
    """Let the PTQ method choose where training starts, or read what it chose before; the errors without training."""
    done = run_dir.load_stage("start")
    if done is not None:
        load_start(student, run_dir.path)
        return done
    began = time.monotonic()
    with phi_suspended(student):
        result = {"rtn": held_out.relative_error(student, reference)}
        initialize_(student, config.init, seed=config.seed)
        result["ptq"] = held_out.relative_error(student, reference)
    save_start(student, run_dir.path)
    result["seconds"] = time.monotonic() - began
    run_dir.save_stage("start", result)
    log.info("held-out error of %s: %.4g (round to nearest: %.4g)", config.names.init, result["ptq"], result["rtn"])
    return result


def fold_student(config: TrainConfig, student: nn.Module, directory: Path, *, steps: int) -> None:
    """Fold a copy of a trained student and write it; raises ValueError while Phi has rank."""
    folded = copy.deepcopy(student)
    fold(folded, kernel=config.kernel)
    save_packed(
        folded,
        directory,
        base_name=config.names.model,
        base_revision=config.model.revision,
        base_arguments={key: value for key, value in config.plain["model"].items() if key not in LOCAL_ARGUMENTS},
        training={
            "method": config.names.method,
            "init": config.names.init,
            "bits": config.bits.label,
            "seed": config.seed,
            "steps": steps,
        },
    )


def _show_plan(config: TrainConfig, student: nn.Module, swapped: SwapReport) -> None:
    layers = quantized_layers(student)
    weights = sum(layer.weight.numel() for layer in layers.values())
    log.info(
        "%s: %d Linears quantized to %s (%s), %d weights; skipped: %s",
        config.names.model, len(swapped.quantized), config.profile.label, config.profile.name, weights,
        ", ".join(swapped.skipped) or "none",
    )  # fmt: skip
    for name in swapped.quantized:
        log.debug("quantized: %s", name)
    log.info(
        "%s from %s: %d steps of %d samples, Phi of ranks %s",
        config.names.method, config.names.init, config.steps, config.batch_size, list(phi_ranks(config)) or "none",
    )  # fmt: skip


def _show_result(data: ReportData, report: Path) -> None:
    error, size = data.relative_error, data.size
    print(f"report: {report}")
    print(f"held-out error of PTQ ({data.run.init}): {error.ptq:.4f}   round to nearest: {error.rtn:.4f}")
    print(f"held-out error of QAT, packed: {error.packed:.4f}   ({error.packed / error.rtn:.2f} x round to nearest)")
    print(f"size: {size.packed / 1024:.0f} KiB packed, {size.bf16 / 1024:.0f} KiB in bfloat16")


def _run_info(config: TrainConfig) -> RunInfo:
    return RunInfo(
        model=config.names.model,
        bits=config.bits.label,
        weight_bits=config.bits.weight,
        activation_bits=config.bits.activation,
        profile=config.profile.name,
        method=config.names.method,
        init=config.names.init,
        seed=config.seed,
        steps=config.steps,
        command=_command(),
        config_yaml=yaml.safe_dump(config.plain, sort_keys=False),
    )


def _command() -> str:
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    began = time.monotonic()
    yield
    seconds[stage] = time.monotonic() - began
