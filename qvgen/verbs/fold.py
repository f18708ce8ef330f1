"""Fold the newest checkpoint of a run into packed/{model.safetensors,manifest.json}."""

from __future__ import annotations

import logging
from pathlib import Path

from qvgen import stop_request
from qvgen.config.schema.train import FoldConfig
from qvgen.cpu_threads import set_threads
from qvgen.deploy.checkpoint import load_packed
from qvgen.deploy.manifest import MANIFEST_FILE, WEIGHTS_FILE
from qvgen.errors import DOES_NOT_FIT, UnfitEnvironmentError
from qvgen.evaluation.packed_checks import codes_equal
from qvgen.training.identity import check_fold
from qvgen.training.planning.deployment import plan_fold
from qvgen.training.session import load_trained
from qvgen.training.start.student import fold_student, prepare_student
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
        lines, can_run = plan_fold(config.run_dir, config.out, model=model, design=design)
        for line in lines:
            print(line)
        return None if can_run else DOES_NOT_FIT
    set_threads(run_config.strategy.threads)
    _say_what_a_stop_leaves(config.out)
    check_fold(config.run_dir, run_config.plain, family=run_config.model, force=config.force)
    student, _ = prepare_student(run_config.model, design, seed=None)
    averaged = run_config.ema.decay is not None and run_config.ema.fold
    step = load_trained(student, config.run_dir, schedule=design.schedule(run_config.steps), averaged=averaged)
    design.method.finish_(student)
    try:
        record = packed_record(run_config, steps=step)
        fold_student(student, config.out, model=model, training=record, kernel=run_config.kernel)
    finally:  # a stop that came between the two files is acted on when both are there
        _say_what_a_stop_leaves(config.out)
    log.info("%s: checkpoint of optimizer step %d of %d", config.run_dir, step, run_config.steps)
    equal, count = codes_equal(student, load_packed(config.out, kernel="reference"))
    if not equal:
        raise UnfitEnvironmentError(
            f"{config.out}: the codes that were read back are not those that were trained; do not use it"
        )
    print(f"packed: {config.out} ({count} codes, equal to the trained ones)")
    return None


def _say_what_a_stop_leaves(out: Path) -> None:
    if (out / MANIFEST_FILE).exists():
        stop_request.note(f"before the packed model was checked; {out} holds a whole one, an earlier one or this one")
        stop_request.continue_with({"overwrite": True}, how="start again")
    else:
        stop_request.note("while folding, nothing was written")
