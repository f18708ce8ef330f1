"""The student of a run: prepared from the teacher's weights, started by a PTQ method, folded into a packed checkpoint."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from qvgen import stop_request
from qvgen.config.leaves import load_leaf
from qvgen.config.schema import TrainConfig
from qvgen.deploy.checkpoint import save_packed
from qvgen.evaluation.held_out import MeasuredInputs
from qvgen.evaluation.mixed_precision_files import Allocation, write_allocation
from qvgen.evaluation.report.mixed_precision_section import write_heat_maps
from qvgen.initializers.bit_budget import BitBudget
from qvgen.initializers.prepare import PrepareConfig, initialize_, prepare
from qvgen.layers.shared_input import activation_sharing, unshare_activations_
from qvgen.layers.swap import (
    SwapReport,
    add_switch_widths_,
    folded_copy,
    phi_suspended,
    quantized_layers,
)
from qvgen.models.base import Encode, local_arguments
from qvgen.run_directory import RunDirectory
from qvgen.training.calibration import CalibratedModel
from qvgen.training.layer_setup import add_configured_switch, input_sets, share_inputs_
from qvgen.training.mixed_precision.allocation import allocate_bits_
from qvgen.training.start_file import START_FILE, has_start, load_start, save_start

log = logging.getLogger(__name__)


def prepare_student(config: TrainConfig) -> tuple[nn.Module, SwapReport]:
    """The teacher's weights in float32 with quantized layers, their scales by round-to-nearest.

    Layers that read the same input share their activation quantizers, if the method says so.
    """
    student = config.model.load_teacher(dtype=torch.float32).requires_grad_(True)
    swapped = prepare(
        student,
        PrepareConfig(
            profile=config.profile,
            initializer=load_leaf("init", "rtn"),
            include=config.model.include,
            exclude=config.model.exclude,
            phi_rank=max(config.method.phi_ranks(config.phi), default=0),
            seed=config.seed,
        ),
    )
    add_configured_switch(student, config)
    share_inputs_(student, config)
    config.method.prepare_(student)
    return student, swapped


def calibrate_(
    config: TrainConfig, student: nn.Module, *, teacher: nn.Module, encode: Encode
) -> tuple[CalibratedModel | None, Allocation | None]:
    """What the PTQ method has to know before it sets layers up; a mixed-precision method's layers get their bits here.

    Returns:
        Statistics of the layers, None for a data-free method; the allocation of bits, None where all have the same.
    """
    if not config.init.needs:
        return None, None
    bands = next(iter(quantized_layers(student).values())).noise_band.num_bands
    statistics = CalibratedModel(config, teacher=teacher, encode=encode, num_bands=bands)
    if not isinstance(config.init, BitBudget):
        return statistics, None
    allocation = allocate_bits_(
        config, student, teacher=teacher, encode=encode, statistics=statistics, statistics_key=statistics.folder.name
    )
    return statistics, allocation


def start_student(
    config: TrainConfig,
    run_dir: RunDirectory,
    *,
    student: nn.Module,
    teacher: nn.Module,
    held_out: MeasuredInputs,
    reference: Sequence[Tensor],
) -> Mapping[str, float]:
    """Let the PTQ method choose where training starts, or read what it chose before; the errors without training."""
    done = run_dir.load_stage("start")
    if done is not None and has_start(run_dir.path):
        load_start(student, run_dir.path)
        stop_request.note("after the PTQ start, saved")
        _say_sharing(config, student)
        return done
    began = time.monotonic()
    if (
        done is None and has_start(run_dir.path) and (run_dir.path / START_FILE).is_file()
    ):  # written whole, but what is known of it was lost
        return _measure_start(config, run_dir, student=student, held_out=held_out, reference=reference)
    kept = ", whose statistics and measurements are kept as they come" if config.init.needs else ""
    stop_request.note(f"in the PTQ start{kept}")
    unshare_activations_(quantized_layers(student))  # a method sets each layer up by itself
    with phi_suspended(student):
        result = {"rtn": held_out.relative_error(student, reference)}
        statistics, allocation = calibrate_(config, student, teacher=teacher, encode=held_out.split.encode)
        if allocation is not None:
            write_allocation(run_dir.path, allocation)
            write_heat_maps(run_dir.path, allocation)
        folds = config.model.smoothing_folds(student)
        initialize_(student, config.init, seed=config.seed, statistics=statistics, folds=folds)
        if config.activation_switch.widths is not None:
            add_switch_widths_(student, config.activation_switch.widths)
        share_inputs_(student, config)
        result["ptq"] = held_out.relative_error(student, reference)
    _say_sharing(config, student)
    save_start(student, run_dir.path)
    result["seconds"] = time.monotonic() - began
    run_dir.save_stage("start", result)
    stop_request.note("after the PTQ start, saved")
    if held_out.num_samples:
        log.info("error of %s: %.4g (round to nearest: %.4g)", config.names.init, result["ptq"], result["rtn"])
    return result


def _measure_start(
    config: TrainConfig,
    run_dir: RunDirectory,
    *,
    student: nn.Module,
    held_out: MeasuredInputs,
    reference: Sequence[Tensor],
) -> Mapping[str, float]:
    """Read a start whose record is not there, measure its errors again and record them: a PTQ method may take hours."""
    log.warning("%s is used, its errors are measured again", run_dir.path / START_FILE)
    began = time.monotonic()
    with phi_suspended(student):
        result = {"rtn": held_out.relative_error(student, reference)}
    load_start(student, run_dir.path)
    with phi_suspended(student):
        result["ptq"] = held_out.relative_error(student, reference)
    _say_sharing(config, student)
    result["seconds"] = time.monotonic() - began
    run_dir.save_stage("start", result)
    return result


def _say_sharing(config: TrainConfig, student: nn.Module) -> None:
    if config.method.share_activations:
        shared, sets = activation_sharing(quantized_layers(student)), input_sets(student, config)
        log.info(
            "%d of %d sets of layers that read the same input share their activation ranges%s",
            len(shared),
            len(sets),
            "" if len(shared) == len(sets) else "; the others differ in grid, smoothing or ranges",
        )


def fold_student(config: TrainConfig, student: nn.Module, directory: Path, *, steps: int) -> None:
    """Fold a trained student into a packed checkpoint, itself left as it is; raises ValueError while Phi has rank."""
    local = local_arguments(config.model)
    save_packed(
        folded_copy(student, kernel=config.kernel),
        directory,
        base_name=config.names.model,
        base_revision=config.model.revision,
        base_arguments={key: value for key, value in config.plain["model"].items() if key not in local},
        training={
            "method": config.names.method,
            "init": config.names.init,
            "bits": config.bits.label,
            "seed": config.seed,
            "steps": steps,
            **({"loras": record} if (record := getattr(config.model, "lora_record", None)) else {}),
        },
    )
