"""The student of a run: prepared from the teacher's weights, started by a PTQ method, folded into a packed checkpoint."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qvgen import stop_request
from qvgen.config.leaves import load_leaf
from qvgen.deploy.checkpoint import Put, save_packed, save_packed_parts
from qvgen.evaluation.held_out import MeasuredInputs
from qvgen.evaluation.mixed_precision_files import Allocation, write_allocation
from qvgen.evaluation.report.mixed_precision_section import write_heat_maps
from qvgen.evaluation.sampled_teacher import SampledTeacher
from qvgen.initializers.clip_search import start_clips_
from qvgen.initializers.prepare import PrepareConfig, prepare
from qvgen.layers.branch import kept_rank
from qvgen.layers.shared_input import activation_sharing, unshare_activations_
from qvgen.layers.swap import (
    SwapReport,
    add_switch_widths_,
    folded_copy,
    phi_suspended,
    quantized_layers,
)
from qvgen.methods.base import Method
from qvgen.models.base import VideoDiT, local_arguments
from qvgen.models.few_step import own_timesteps
from qvgen.models.named_family import NamedFamily
from qvgen.run_directory import RunDirectory
from qvgen.training.design.layer_setup import (
    add_configured_switch,
    choose_gradient_path_,
    input_sets,
    set_up_phi_,
    share_inputs_,
)
from qvgen.training.design.student import StudentDesign
from qvgen.training.distributed.layer_shares import SHARES_DIRECTORY, remove_shares
from qvgen.training.progress import progress_bar
from qvgen.training.start.file import START_FILE, has_start, load_start, save_start
from qvgen.training.start.ptq_method import PTQMethod
from qvgen.training.start.run_calibration import calibrate_
from qvgen.training.start.shared import StartHelpers, initialize_together_

log = logging.getLogger(__name__)


def prepare_student(family: VideoDiT, design: StudentDesign, *, seed: int | None) -> tuple[nn.Module, SwapReport]:
    """The teacher's weights in float32 with quantized layers, their scales by round-to-nearest.

    Layers that read the same input share their activation quantizers, if the method says so.

    Args:
        family: The model family; its trained weights are loaded.
        design: The student's layers.
        seed: Seed of the decomposition that starts Phi; None: Phi is left at 0, for a start or a state that follows.

    Returns:
        The student, and the names of its Linears that are quantized and of those that are not.

    Raises:
        ValueError: There are no weights; patterns, a profile or a rank that do not fit the model's layers.
    """
    student = family.load_teacher(dtype=torch.float32).requires_grad_(True)
    swapped = prepare(
        student,
        PrepareConfig(
            profile=design.profile,
            initializer=load_leaf("init", "rtn"),
            include=family.include,
            exclude=family.exclude,
            timesteps=own_timesteps(family),
            phi_rank=design.phi_rank,
            phi_keep=design.phi_keep,
            seed=seed or 0,
            starts_phi=seed is not None,
        ),
    )
    set_up_phi_(student, design.phi)
    add_configured_switch(student, design.activation_switch)
    choose_gradient_path_(student, design.zero_point_gradient)
    share_inputs_(student, family=family, method=design.method)
    design.method.prepare_(student)
    return student, swapped


def set_up_student_(
    student: nn.Module,
    *,
    design: StudentDesign,
    ptq: PTQMethod,
    teacher: SampledTeacher,
    helpers: StartHelpers | None = None,
) -> Allocation | None:
    """Let a PTQ method choose where a prepared student's training starts, with the calibration that it needs.

    Args:
        student: As :func:`prepare_student` gives it.
        design: Its layers.
        ptq: The PTQ method.
        teacher: The full-precision model; its seed also starts Phi.
        helpers: The other processes, which set up layers too; None: there are none.

    Returns:
        The allocation of bits; None where all layers have the same.

    Raises:
        UserError: See :func:`calibrate_`.
        UnfitEnvironmentError: Another process failed or is gone.
    """
    unshare_activations_(quantized_layers(student))  # a method sets each layer up by itself
    statistics, allocation = calibrate_(student, ptq, profile=design.profile, teacher=teacher, helpers=helpers)
    chosen = {"family": teacher.family, "seed": teacher.seed, "statistics": statistics, "helpers": helpers}
    with progress_bar(desc=f"start by {ptq.name}", unit="layer", total=len(quantized_layers(student))) as bar:
        seen = initialize_together_(student, ptq.init, **chosen, done=bar.update)
    if design.switch_widths is not None:
        add_switch_widths_(student, design.switch_widths)
    if seen is not None and ptq.searches_clips:
        start_clips_(quantized_layers(student), input_sets(student, teacher.family), statistics=seen)
    share_inputs_(student, family=teacher.family, method=design.method)
    design.method.start_(student, seed=teacher.seed)
    return allocation


@dataclass(frozen=True, kw_only=True, eq=False)
class Measured:
    """The inputs that a student is measured on, and the full-precision model's outputs for them.

    Attributes:
        inputs: The inputs.
        reference: The full-precision model's outputs, float32, batch by batch.
    """

    inputs: MeasuredInputs
    reference: Sequence[Tensor]

    def error(self, model: nn.Module) -> float:
        """Relative error |y - y_ref|^2 / |y_ref|^2 of a model's outputs."""
        return self.inputs.relative_error(model, self.reference)


def start_student(
    run_dir: RunDirectory,
    student: nn.Module,
    *,
    design: StudentDesign,
    ptq: PTQMethod,
    teacher: SampledTeacher,
    measured: Measured,
    helpers: StartHelpers | None = None,
) -> Mapping[str, float]:
    """Let the PTQ method choose where training starts, or read what it chose before.

    Args:
        run_dir: The run's claimed folder, which keeps the start.
        student: As :func:`prepare_student` gives it; holds the start afterwards.
        design: The student's layers.
        ptq: The PTQ method.
        teacher: The full-precision model.
        measured: What the start is measured on.
        helpers: The run's other processes, which set up layers too; None: there are none.

    Returns:
        The errors without training: of round-to-nearest ``rtn`` and of the method ``ptq``; and ``seconds``.
    """
    family, method = teacher.family, design.method
    done = run_dir.load_stage("start")
    if done is not None and has_start(run_dir.path):
        load_start(student, run_dir.path)
        stop_request.note("after the PTQ start, saved")
        _say_sharing(student, family=family, method=method)
        return done
    began = time.monotonic()
    if (
        done is None and has_start(run_dir.path) and (run_dir.path / START_FILE).is_file()
    ):  # written whole, but what is known of it was lost
        result = _measure_start(run_dir, student, measured=measured)
        _say_sharing(student, family=family, method=method)
        result["seconds"] = time.monotonic() - began
        run_dir.save_stage("start", result)
        return result
    kept = ", whose statistics and measurements are kept as they come" if ptq.needs(design.profile) else ""
    stop_request.note(f"in the PTQ start{kept}")
    unshare_activations_(quantized_layers(student))  # as the method will find it
    with phi_suspended(student):
        result = {"rtn": measured.error(student)}
        allocation = set_up_student_(student, design=design, ptq=ptq, teacher=teacher, helpers=helpers)
        if allocation is not None:
            write_allocation(run_dir.path, allocation)
            write_heat_maps(run_dir.path, allocation)
        result["ptq"] = measured.error(student)
    _say_sharing(student, family=family, method=method)
    save_start(student, run_dir.path)
    remove_shares(run_dir.path / SHARES_DIRECTORY)  # what a start that was stopped had made
    result["seconds"] = time.monotonic() - began
    run_dir.save_stage("start", result)
    stop_request.note("after the PTQ start, saved")
    if measured.inputs.num_samples:
        log.info("error of %s: %.4g (round to nearest: %.4g)", ptq.name, result["ptq"], result["rtn"])
    return result


def _measure_start(run_dir: RunDirectory, student: nn.Module, *, measured: Measured) -> dict[str, float]:
    """Read a start whose record is not there and measure its errors again: a PTQ method may take hours."""
    log.warning("%s is used, its errors are measured again", run_dir.path / START_FILE)
    with phi_suspended(student):
        result = {"rtn": measured.error(student)}
    load_start(student, run_dir.path)
    with phi_suspended(student):
        result["ptq"] = measured.error(student)
    return result


def _say_sharing(student: nn.Module, *, family: VideoDiT, method: Method) -> None:
    if method.share_activations:
        shared, sets = activation_sharing(quantized_layers(student)), input_sets(student, family)
        log.info(
            "%d of %d sets of layers that read the same input share their activation ranges%s",
            len(shared),
            len(sets),
            "" if len(shared) == len(sets) else "; the others differ in grid, smoothing or ranges",
        )


def fold_student(
    student: nn.Module, directory: Path, *, model: NamedFamily, training: Mapping[str, Any], kernel: str = "auto"
) -> None:
    """Fold a trained student into a packed checkpoint, itself left as it is.

    Args:
        student: Trained; its Phi is gone, or to be kept.
        directory: Where the packed checkpoint goes.
        model: The model that it was made from.
        training: What the manifest says of how it was made; plain values.
        kernel: Backend of the packed layers while they are written.

    Raises:
        ValueError: Phi has rank and is not to be kept.
    """
    kept = max(map(kept_rank, quantized_layers(student).values()), default=0)
    save_folded(folded_copy(student, kernel=kernel), directory, model=model, training=training, kept=kept)


def save_folded(
    folded: nn.Module,
    directory: Path,
    *,
    model: NamedFamily,
    training: Mapping[str, Any],
    kept: int,
    fill: Callable[[Put], None] | None = None,
) -> None:
    """Write a folded student; arguments as for :func:`fold_student`.

    Args:
        folded: The packed model.
        directory: Where the packed checkpoint goes.
        model: The model that it was made from.
        training: What the manifest says of how it was made.
        kept: The largest rank of a Phi that stayed.
        fill: Gives the tensors where the packed model has none, see :func:`qvgen.deploy.checkpoint.save_packed_parts`.
    """
    local = local_arguments(model.family)
    loras = getattr(model.family, "lora_record", None)
    about: dict[str, Any] = {
        "base_name": model.name,
        "base_revision": model.family.revision,
        "base_arguments": {key: value for key, value in model.section.items() if key not in local},
        "training": {
            **training,
            **({"phi_kept_rank": kept} if kept else {}),
            **({"loras": loras} if loras else {}),
        },
    }
    if fill is None:
        save_packed(folded, directory, **about)
    else:
        save_packed_parts(folded, directory, fill=fill, **about)
