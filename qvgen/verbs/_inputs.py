"""What a run is measured on: held-out clips; or, for `qvgen ptq` without clips, what the full-precision model samples."""

from __future__ import annotations

import logging
from collections.abc import Callable

from torch import nn

from qvgen.config.schema.train import TrainConfig
from qvgen.data.source import Split
from qvgen.errors import UserError
from qvgen.evaluation.held_out import HeldOut, MeasuredInputs
from qvgen.evaluation.prompts import calibration_prompts, evaluation_prompts, shown_videos
from qvgen.evaluation.sampled_inputs import EncodedCaptions, NothingMeasured, SampledInputs
from qvgen.models.few_step import sampling_steps
from qvgen.models.given_image import check_images
from qvgen.models.guidance import texts_to_encode
from qvgen.verbs._checks import only_to_measure, without_clips
from qvgen.verbs._parts import ptq_method, sampled_needs, sampled_teacher, step_batch
from qvgen.verbs.precompute import fill_missing

log = logging.getLogger(__name__)


def open_inputs(config: TrainConfig) -> Callable[[nn.Module], MeasuredInputs]:
    """Check all that a run reads besides weights, before its folder is made.

    Returns:
        The full-precision model -> what models are compared on.

    Raises:
        ValueError: Clips, captions or a text encoder are missing.
    """
    _check_images(config)
    _say_what_is_left_out(config)
    if config.evaluation.samples == 0 or without_clips(config):
        encode = EncodedCaptions(config.model)
        _encode_all(config, encode)
        if config.evaluation.samples == 0:
            log.info("evaluation.samples=0: no errors are measured and no videos are sampled")
            return lambda _: NothingMeasured(encode=encode)
        log.info("no data.path: errors are measured on inputs of the full-precision model's own sampling")
        return lambda teacher: SampledInputs(
            sampled_teacher(config, teacher, encode=encode),
            prompts=evaluation_prompts(config.evaluation, config.model),
            num_samples=config.evaluation.samples,
            num_steps=sampling_steps(config.model, config.calibration.steps, needs=sampled_needs(config)),
        )
    fill_missing(config, texts=_texts(config))
    left_out, held_out = _check_clips(config).left_out, open_held_out(config)

    def inputs(_: nn.Module) -> MeasuredInputs:
        """Say what the numbers rest on, now that nothing is refused any more."""
        if left_out:
            log.info("%s", left_out)
        held_out.warn_if_few()
        return held_out

    return inputs


def open_held_out(config: TrainConfig) -> HeldOut:
    """The held-out clips that a run measures errors on."""
    return HeldOut(
        config.model,
        config.data.open(config.model, split="held_out"),
        num_samples=config.evaluation.samples,
        batch_size=step_batch(config).micro_batch_size,
    )


def _say_what_is_left_out(config: TrainConfig) -> None:
    """Name prompts that the numbers of videos leave no place for."""
    for key, section in (("evaluation", config.evaluation), ("calibration", config.calibration)):
        if section.prompts is not None and (left := section.prompts.num_videos - section.videos) > 0:
            log.info("%s.videos=%d: the last %d of %s.prompts are left out", key, section.videos, left, key)


def _check_images(config: TrainConfig) -> None:
    """Raise UserError where what is sampled lacks the images that the model begins videos with, or has some of no use."""
    captions: list[str] = []
    if config.evaluation.samples:
        captions += [video.caption for video in shown_videos(config.evaluation, config.model, seed=config.seed)]
        captions += evaluation_prompts(config.evaluation, config.model).captions if without_clips(config) else []
    check_images(config.model, captions, key="evaluation.prompts")
    if sampled_needs(config):
        prompts = calibration_prompts(ptq_method(config).calibration, config.model)
        check_images(config.model, prompts.captions, key="calibration.prompts")


def _texts(config: TrainConfig) -> list[str]:
    """All that a text encoder reads for what is sampled: captions and negative prompts."""
    prompts = [evaluation_prompts(config.evaluation, config.model)] if config.evaluation.samples else []
    prompts += [calibration_prompts(ptq_method(config).calibration, config.model)] if sampled_needs(config) else []
    return list(dict.fromkeys(text for part in prompts for text in texts_to_encode(config.model, part)))


def _encode_all(config: TrainConfig, encode: EncodedCaptions) -> None:
    """Encode all texts at once, while nothing else needs the memory; none where nothing is sampled."""
    if texts := _texts(config):
        with only_to_measure(config):
            encode(texts)


def _check_clips(config: TrainConfig) -> Split:
    """The clips to train on; raises ValueError for what would only be noticed after the run's folder was made."""
    split = config.data.open(config.model, split="train")
    largest = max(split.buckets.count(bucket) for bucket in set(split.buckets))
    if config.steps and config.batch_size > largest:
        raise UserError(
            f"batch_size={config.batch_size} is larger than the training data of {largest} clips of one shape; use less"
        )
    split.encode(_texts(config))
    return split
