"""What `train` and `ptq` check of what they measure on, in a dry run too; imports little."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from qvgen.config.schema import TrainConfig
from qvgen.errors import UserError
from qvgen.verbs._parts import sampled_needs


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
