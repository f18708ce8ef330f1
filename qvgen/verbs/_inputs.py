"""What a run is measured on: held-out clips; or, for `qvgen ptq` without clips, what the full-precision model samples."""

from __future__ import annotations

import logging
from collections.abc import Callable

from torch import nn

from qvgen.config.errors import UserError
from qvgen.config.schema import TrainConfig
from qvgen.data.clip_source import ClipSource
from qvgen.evaluation.held_out import HeldOut, MeasuredInputs
from qvgen.evaluation.sampled_inputs import EncodedCaptions, NothingMeasured, SampledInputs
from qvgen.training.calibration import calibration_prompts
from qvgen.training.session import micro_batch_size
from qvgen.verbs.precompute import fill_missing

log = logging.getLogger(__name__)


def open_inputs(config: TrainConfig) -> Callable[[nn.Module], MeasuredInputs]:
    """Check all that a run reads besides weights, before its folder is made.

    Returns:
        The full-precision model -> what models are compared on.

    Raises:
        ValueError: Clips, captions or a text encoder are missing.
    """
    if config.evaluation.samples == 0 or without_clips(config):
        encode = EncodedCaptions(config.model)
        _encode_all(config, encode)
        if config.evaluation.samples == 0:
            log.info("evaluation.samples=0: no errors are measured and no videos are sampled")
            return lambda _: NothingMeasured(config, encode=encode)
        log.info("no data.path: errors are measured on inputs of the full-precision model's own sampling")
        return lambda teacher: SampledInputs(config, teacher=teacher, encode=encode)
    fill_missing(config, captions=_captions(config))
    _check_clips(config)
    held_out = open_held_out(config)
    return lambda _: held_out


def open_held_out(config: TrainConfig) -> HeldOut:
    """The held-out clips that a run measures errors on."""
    return HeldOut(
        config.model,
        config.data.open(config.model, split="held_out"),
        num_samples=config.evaluation.samples,
        seed=config.seed,
        batch_size=micro_batch_size(config),
    )


def without_clips(config: TrainConfig) -> bool:
    """Whether the run trains nothing and no clips were named."""
    source = config.data
    return config.method.name == "ptq" and isinstance(source, ClipSource) and source.path is None


def _captions(config: TrainConfig) -> list[str]:
    """All captions that are sampled from."""
    shown = list(config.evaluation.prompts or config.model.prompts) if config.evaluation.samples else []
    return list(dict.fromkeys([*shown, *(calibration_prompts(config) if config.init.needs else [])]))


def _encode_all(config: TrainConfig, encode: EncodedCaptions) -> None:
    """Encode all captions at once, while nothing else needs the memory; none where nothing is sampled."""
    captions = _captions(config)
    if not captions:
        return
    try:
        encode([*captions, ""])
    except ValueError as error:
        if config.init.needs:
            raise
        raise UserError(
            f"{error}; init={config.names.init} itself needs none of it: write evaluation.samples=0 for a packed model that "
            "is not measured"
        ) from error


def _check_clips(config: TrainConfig) -> None:
    """Raise ValueError for what would only be noticed after the run's folder was made, or hours later."""
    split = config.data.open(config.model, split="train")
    largest = max(split.buckets.count(bucket) for bucket in set(split.buckets))
    if config.steps and config.batch_size > largest:
        raise UserError(
            f"batch_size={config.batch_size} is larger than the training data of {largest} clips of one shape; use less"
        )
    split.encode(_captions(config))
