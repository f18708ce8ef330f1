"""The way of a run whose processes hold no whole model (``strategy.low_host_memory=true``): start, training, checkpoint.

Packing, and measuring a packed model, take whole models. They are left to `qvgen fold`, or to the same run
continued without the key, on whatever host has the memory.
"""

from __future__ import annotations

import logging

from qvgen import stop_request
from qvgen.config.command_line import command_line
from qvgen.config.schema.train import TrainConfig
from qvgen.errors import UserError
from qvgen.models.tensor_reader import tensor_reader_of
from qvgen.training.shared_error import SharedError
from qvgen.training.start.file import LAYERS_FILE, START_FILE, check_start
from qvgen.training.start.streamed import make_streamed_start
from qvgen.training.whole_run import early_workers, start_helpers, trained
from qvgen.verbs._inputs import open_held_out, open_inputs
from qvgen.verbs._parts import claim, open_log, student_design, training_output, training_run

log = logging.getLogger(__name__)


def train_streamed(config: TrainConfig) -> None:
    """Make the start layer by layer, train shares, and say what packs the last checkpoint.

    Raises:
        UserError: The model's weights can't be read tensor by tensor.
    """
    log.debug("%s: weights %s", config.names.model, config.model.revision)  # raises where there are none
    if tensor_reader_of(config.model) is None:
        raise UserError(
            f"strategy.low_host_memory=true reads model={config.names.model} tensor by tensor, which its weights or a "
            "finetune of them can't be; leave the key out"
        )
    open_inputs(config)
    run, design = training_run(config), student_design(config)
    with (
        claim(config) as run_dir,
        open_log(config, run_dir.path) as loggers,
        early_workers(run, run_dir.path, settings=config.plain, hang_minutes=config.training.hang_minutes) as workers,
    ):
        if all((run_dir.path / name).is_file() for name in (START_FILE, LAYERS_FILE)):
            check_start(run_dir.path)
        else:
            stop_request.note("in the PTQ start")
            helpers = start_helpers(run, run_dir.path, settings=config.plain, workers=workers)
            assert helpers is not None, "a model that is shared out has several processes"
            how = {"family": config.model, "design": design, "init": config.init, "seed": config.seed}
            make_streamed_start(run_dir.path, **how, helpers=helpers)
        stop_request.note("after the PTQ start, saved")
        validate = None
        if config.evaluation.every_steps is not None:
            context = config.strategy.context_parallel
            validate = SharedError(open_held_out(config), reference=None, together=True, context=context)
        with trained(
            run,
            training_output(config, run_dir.path, validate=validate, loggers=loggers),
            student=None,
            teacher=None,
            settings=config.plain,
            hang_minutes=config.training.hang_minutes,
            workers=workers,
        ) as steps:
            pass  # what follows takes whole models
    print(f"trained: {run_dir.path}, checkpoint of step {steps}; no model was put together on this host")
    print(f"to pack it: {command_line('fold', [f'run_dir={run_dir.path}'])}")
