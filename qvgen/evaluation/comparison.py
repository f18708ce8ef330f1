"""Teacher, PTQ start, fake-quantized and packed model side by side: the same captions, the same seeds, the same noise.

The videos that are shown come from the configuration's prompts; the table is measured on as many held-out captions as the
relative error. Differences between fake-quantized and packed are counted, not only bounded.

The PTQ start's videos are sampled last of all, with the student brought back to where training began: nothing that is
measured before can depend on them, and no further copy of the weights is held.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from qvgen.config.prompts.prompt import PromptedVideo
from qvgen.data.video import write_video
from qvgen.evaluation.held_out import MeasuredInputs
from qvgen.evaluation.packed_checks import check_packed
from qvgen.evaluation.quality_data import Quality, Sampling
from qvgen.evaluation.report_data import Checks, VideoComparison
from qvgen.evaluation.sampling_cost import describe_device, memory_source
from qvgen.evaluation.shared_sampling import Asked, ModelAbsentError, OpenModel, Sampled, SharedSampling
from qvgen.evaluation.video_quality import STILL, open_metrics, video_quality
from qvgen.layers.layer_threads import idle_threads, in_threads

log = logging.getLogger(__name__)

START = "ptq-start"
FAKE, PACKED = "fake-quantized", "packed"
MEASURED = (FAKE, PACKED)
"""The models whose outputs for the held-out inputs are computed at the end of a run."""
VARIANTS = ("teacher", START, *MEASURED)
"""The models of a run that are sampled, as tables and pages show them."""
COMPARED_STAGE, ALONE_STAGE, START_STAGE = "compared", "alone", "start"
"""Models that rank 0 alone has are a stage of their own; the start is sampled when nothing needs the trained student."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The results of :func:`compare_models`.

    Attributes:
        outputs: A run's own model -> its outputs for each batch of the held-out inputs.
    """

    outputs: Mapping[str, Sequence[Tensor]]
    checks: Checks
    videos: tuple[VideoComparison, ...]
    quality: Quality
    sampling: Sampling


@dataclass(frozen=True, kw_only=True, eq=False)
class ComparedModels:
    """The models that stand side by side.

    Attributes:
        teacher: The full-precision model.
        fake: The trained model, its Phi gone; where the start is sampled it may hold the start afterwards.
        packed: The same, read back from its packed directory.
        start_absent: Why the PTQ start is not sampled; None: it is.
        is_alone: Whether no other process has the trained model.
    """

    teacher: nn.Module
    fake: nn.Module
    packed: nn.Module
    start_absent: str | None
    is_alone: bool = False


def compare_models(
    models: ComparedModels,
    *,
    held_out: MeasuredInputs,
    sampling: SharedSampling,
    to_start: OpenModel,
    fake_outputs: Sequence[Tensor] | None = None,
) -> Comparison:
    """Compute videos and outputs with all models, write the shown videos to run_dir/videos, and compare.

    What is sampled is kept in the run's folder until the report is written (:mod:`qvgen.evaluation.kept_samples`).

    Args:
        models: What is compared.
        held_out: Inputs on which codes of fake and packed are compared.
        sampling: The videos and outputs, and which of the run's processes computes which.
        to_start: Brings the student to the run's start while its videos are sampled.
        fake_outputs: The trained model's outputs for each batch of the inputs; None: they are among what is sampled.
    """
    asked = sampling.asked
    compared = open_compared(teacher=lambda: models.teacher, fake=models.fake, packed=lambda: models.packed)
    own = {FAKE: compared[FAKE]} if models.is_alone else {}
    stages = {ALONE_STAGE: own, COMPARED_STAGE: {name: model for name, model in compared.items() if name not in own}}
    for stage, opened in stages.items():
        sampling.sample(stage, opened)
    found = {name: one for stage, opened in stages.items() for name, one in sampling.gather(stage, opened).items()}
    sampled = {name: found[name] for name in compared}
    tables = {name: one.table for name, one in sampled.items()}
    outputs: dict[str, Sequence[Tensor]] = {name: sampled[name].outputs for name in MEASURED}
    if fake_outputs is not None:
        outputs[FAKE] = fake_outputs
    checks = check_packed(models.fake, models.packed, held_out=held_out, outputs=outputs, videos=tables)
    absent, start_videos = sample_start(sampling, to_start, absent=models.start_absent)
    if start_videos is not None:
        sampled = {"teacher": sampled.pop("teacher"), START: start_videos, **sampled}  # as tables and pages show them
    frames = {name: one.shown for name, one in sampled.items()}
    _write_videos(frames, asked.shown, fps=asked.family.fps, directory=sampling.kept.run_dir / "videos")
    return Comparison(
        outputs=outputs,
        checks=checks,
        videos=_comparisons(frames, asked),
        quality=_quality(sampled, asked, start_absent=absent),
        sampling=_sampling(sampled, asked, num_processes=sampling.queue.num_processes),
    )


def open_compared(
    *, teacher: Callable[[], nn.Module], fake: nn.Module | None, packed: Callable[[], nn.Module]
) -> dict[str, OpenModel]:
    """The models of the first stage, as any process of the run samples them.

    Args:
        teacher: Gives the full-precision model.
        fake: The trained model; None: this process has none.
        packed: Gives the packed model.
    """
    trained: dict[str, OpenModel] = {} if fake is None else {FAKE: lambda: nullcontext(fake)}
    return {"teacher": lambda: nullcontext(teacher()), **trained, PACKED: lambda: nullcontext(packed())}


def sample_start(
    sampling: SharedSampling, to_start: OpenModel, *, absent: str | None
) -> tuple[str | None, Sampled | None]:
    """The PTQ start's videos; a start that cannot be read any more costs these alone, and never the report of a run.

    Returns:
        Why there are none, or None; and the videos.
    """
    if absent is not None:
        return absent, None
    try:
        sampling.sample(START_STAGE, {START: to_start})
        return None, sampling.gather(START_STAGE, {START: to_start})[START]
    except ModelAbsentError as error:
        log.warning("the videos of the PTQ start are left out: %s", error)
        return str(error), None


def _comparisons(videos: Mapping[str, Tensor], asked: Asked) -> tuple[VideoComparison, ...]:
    start = videos.get(START)
    return tuple(
        VideoComparison(
            prompt=video.caption,
            seed=video.seed,
            fps=asked.family.fps,
            teacher=videos["teacher"][index].numpy(),
            start=None if start is None else start[index].numpy(),
            fake_quantized=videos[FAKE][index].numpy(),
            packed=videos[PACKED][index].numpy(),
            negative_prompt=video.negative,
        )
        for index, video in enumerate(asked.shown)
    )


def _quality(sampled: Mapping[str, Sampled], asked: Asked, *, start_absent: str | None) -> Quality:
    family, metrics = asked.family, open_metrics(sampled["teacher"].table)
    given = {"teacher": sampled["teacher"].table, "items": asked.items, "metrics": metrics.usable}
    jobs = (partial(video_quality, name, one.table, **given) for name, one in sampled.items())
    threads = 1 if torch.cuda.is_available() else idle_threads()
    rows = dict(zip(sampled, in_threads(jobs, threads=threads), strict=True))
    return Quality(
        variants=tuple(replace(row, activation_bits=sampled[name].activation_bits) for name, row in rows.items()),
        num_videos=len(asked.items),
        num_still_videos=sum(STILL in caption for caption in asked.captions),
        seeds=f"{asked.seeds[0]}..{asked.seeds[-1]}",
        num_steps=family.num_inference_steps,
        guidance_scale=family.guidance_scale,
        negative_prompt=None if family.guidance_scale == 1 else family.negative_prompt,
        metrics=metrics.titles,
        left_out=metrics.left_out,
        start_absent=start_absent,
    )


def _sampling(sampled: Mapping[str, Sampled], asked: Asked, *, num_processes: int) -> Sampling:
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    warm = "after the shown ones" if num_processes == 1 and asked.shown else "after others of the same model"
    warm = warm if all(one.is_warm for one in sampled.values()) else "the first use included"
    together = f", by {num_processes} processes at once" if num_processes > 1 else ""
    return Sampling(
        costs=tuple(one.cost for one in sampled.values()),
        device=describe_device(device),
        conditions=(
            f"{len(asked.items)} videos, {warm}{together}; peak memory: all tensors of the model, and "
            f"{memory_source(device)} while it sampled beyond what was there before"
        ),
    )


def _write_videos(sampled: Mapping[str, Tensor], shown: Sequence[PromptedVideo], *, fps: int, directory: Path) -> None:
    directory.mkdir(exist_ok=True)
    jobs = (
        partial(
            write_video,
            directory / video_name(index, video.caption, seed=video.seed, variant=name),
            batch[index].numpy(),
            fps=fps,
        )
        for name, batch in sampled.items()
        for index, video in enumerate(shown)
    )
    for _ in in_threads(jobs, threads=idle_threads()):
        pass


def video_name(index: int, prompt: str, *, seed: int, variant: str) -> str:
    """File name of a video: safe characters of the prompt only; where they do not say all of it, its checksum too.

    >>> video_name(0, "a red boat", seed=1, variant="packed")
    '00-a-red-boat-seed1-packed.mp4'
    >>> video_name(0, "A red boat, at sea", seed=1, variant="packed")
    '00-a-red-boat--at-sea-c14f0adb-seed1-packed.mp4'
    """
    return f"{prompt_name(index, prompt)}-seed{seed}-{variant}.mp4"


def prompt_name(index: int, prompt: str) -> str:
    """The part of a video's name that says which prompt of a list it was made from."""
    words = "".join(letter if letter.isalnum() else "-" for letter in prompt.lower())[:60]
    words = words.encode()[:180].decode(errors="ignore").strip("-")  # a name has room for 255 bytes in all
    if words.replace("-", " ") != prompt:  # another prompt could give the same words
        words = f"{words}-{hashlib.sha256(prompt.encode()).hexdigest()[:8]}"
    return f"{index:02d}-{words}"
