"""Fold the newest checkpoint of a run into packed/{model.safetensors,manifest.json}."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import Any

from qvgen import stop_request
from qvgen.config.schema.train import FoldConfig
from qvgen.cpu_threads import set_threads
from qvgen.deploy.checkpoint import load_packed
from qvgen.deploy.manifest import MANIFEST_FILE, WEIGHTS_FILE
from qvgen.errors import DOES_NOT_FIT, UnfitEnvironmentError
from qvgen.evaluation.packed_checks import codes_equal
from qvgen.models.named_family import NamedFamily
from qvgen.training.design.student import StudentDesign
from qvgen.training.identity import check_fold
from qvgen.training.planning.deployment import plan_fold
from qvgen.training.session import load_trained, newest_checkpoint, of_this_model, read_trained
from qvgen.training.start.streamed_fold import StreamedFold, why_whole
from qvgen.training.start.student import fold_student, prepare_student, save_folded
from qvgen.verbs._earlier_result import refuse_earlier
from qvgen.verbs._parts import named_family, packed_record, student_design

log = logging.getLogger(__name__)


def run(config: FoldConfig) -> int | None:
    """Fold, write, read back and compare; refused while Phi has rank, and where an earlier result would be replaced.

    Returns:
        The exit code of a dry run that does not fit; None otherwise.
    """
    refuse_earlier(config.out, (WEIGHTS_FILE, MANIFEST_FILE), overwrite=config.overwrite)
    run_config = config.run
    if not run_config.method.quantizes:
        raise ValueError(f"{config.run_dir} is a run of method={run_config.names.method}: there is nothing to fold")
    model, design = named_family(run_config), student_design(run_config)
    if config.dry_run:
        lines, can_run = plan_fold(config.run_dir, config.out, model=model, design=design, steps=run_config.steps)
        for line in lines:
            print(line)
        return None if can_run else DOES_NOT_FIT
    set_threads(run_config.strategy.threads)
    _say_what_a_stop_leaves(config.out)
    check_fold(config.run_dir, run_config.plain, family=run_config.model, force=config.force)
    try:
        equal, count, step = (_fold_whole if why_whole(design, run_config.steps) else _fold_by_layers)(
            config, model, design
        )
    finally:  # a stop that came between the two files is acted on when both are there
        _say_what_a_stop_leaves(config.out)
    log.info("%s: checkpoint of optimizer step %d of %d", config.run_dir, step, run_config.steps)
    if not equal:
        raise UnfitEnvironmentError(
            f"{config.out}: the codes that were read back are not those that were trained; do not use it"
        )
    print(f"packed: {config.out} ({count} codes, equal to the trained ones)")
    return None


def _is_averaged(config: FoldConfig) -> bool:
    return config.run.ema.decay is not None and config.run.ema.fold


def _fold_by_layers(config: FoldConfig, model: NamedFamily, design: StudentDesign) -> tuple[bool, int, int]:
    """Fold a student that no process ever holds; whether all codes are the trained ones, how many, and the step."""
    newest, schedule = newest_checkpoint(config.run_dir), design.schedule(config.run.steps)
    with of_this_model(newest):
        step, trained, average = read_trained(newest, config.run_dir, averaged=_is_averaged(config))
        how: dict[str, Any] = {"trained": trained, "averaged": average, "schedule": schedule, "step": step}
        folding = StreamedFold(model.family, design, config.run_dir, **how)
    kernel, record = config.run.kernel, packed_record(config.run, steps=step)
    folded, fill = folding.declare_(kernel=kernel), partial(folding.write, kernel=kernel)
    save_folded(folded, config.out, model=model, training=record, kept=folding.kept_rank, fill=fill)
    return (*folding.codes_equal(config.out), step)


def _fold_whole(config: FoldConfig, model: NamedFamily, design: StudentDesign) -> tuple[bool, int, int]:
    """The same of a method that may look at the whole student behind its last step."""
    student, _ = prepare_student(config.run.model, design, seed=None)
    schedule = design.schedule(config.run.steps)
    step = load_trained(student, config.run_dir, schedule=schedule, averaged=_is_averaged(config))
    design.method.finish_(student)
    record = packed_record(config.run, steps=step)
    fold_student(student, config.out, model=model, training=record, kernel=config.run.kernel)
    return (*codes_equal(student, load_packed(config.out, kernel="reference")), step)


def _say_what_a_stop_leaves(out: Path) -> None:
    if (out / MANIFEST_FILE).exists():
        stop_request.note(f"before the packed model was checked; {out} holds a whole one, an earlier one or this one")
        stop_request.continue_with({"overwrite": True}, how="start again")
    else:
        stop_request.note("while folding, nothing was written")
