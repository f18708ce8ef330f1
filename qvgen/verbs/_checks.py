"""What `train` and `ptq` check of what they measure on, in a dry run too; imports little."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from qvgen.config.schema.train import TrainConfig
from qvgen.errors import UserError
from qvgen.training.start.student_check import why_not_streamed
from qvgen.verbs._exports import refuse_exports
from qvgen.verbs._parts import ptq_method, sampled_needs, student_design


def without_clips(config: TrainConfig) -> bool:
    """Whether the run trains nothing and no clips were named."""
    return config.method.trains == "nothing" and not config.data.is_given


def check_sampling_parts(config: TrainConfig) -> None:
    """Find out in seconds whether what encodes texts and videos is there and whole, if the run encodes any.

    Raises:
        ValueError: a part is missing or damaged.
    """
    measured = config.evaluation.samples > 0 or bool(sampled_needs(config))
    if measured and hasattr(config.model, "check_sampling_parts"):
        with only_to_measure(config):
            config.model.check_sampling_parts()


def check_low_host_memory(config: TrainConfig) -> None:
    """Raise UserError where a run with ``strategy.low_host_memory`` would need a whole model on a host."""
    why = None
    if not config.method.quantizes:
        why = f"method={config.names.method} begins with a whole model; leave the key out"
    elif ptq_method(config).needs(config.profile):
        why = f"init={config.names.init} samples the full-precision model; write init=mse or init=rtn"
    elif config.evaluation.every_steps is not None and not (
        config.method.needs_teacher or config.evaluation.video_every_steps is not None
    ):
        why = (
            f"evaluation.every_steps compares with the full-precision model, which method={config.names.method} trains "
            "without; leave that out"
        )
    why = why or why_not_streamed(student_design(config), config.init, name=config.names.init)
    if why is not None:
        raise UserError(f"strategy.low_host_memory=true holds no whole model on a host, and {why}")
    refuse_exports(
        config, why="with strategy.low_host_memory=true the run ends with a checkpoint, and qvgen fold packs it"
    )


@contextmanager
def only_to_measure(config: TrainConfig) -> Iterator[None]:
    """Say where what is missing is needed to measure the result alone, and how to do without."""
    try:
        yield
    except ValueError as error:
        if sampled_needs(config) or config.method.trains != "nothing":
            raise
        raise UserError(
            f"{error}; init={config.names.init} itself needs none of it: write evaluation.samples=0 for a packed model that "
            "is not measured"
        ) from error
