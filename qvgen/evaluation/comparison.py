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
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qvgen.config.prompt import PromptedVideo
from qvgen.data.source import Split
from qvgen.data.video import write_video
from qvgen.deploy.delta_switch import find_switch
from qvgen.deploy.packed_fusion import kernel_names
from qvgen.evaluation.held_out import MeasuredInputs
from qvgen.evaluation.kept_samples import KeptSamples, Sampled
from qvgen.evaluation.packed_checks import check_packed
from qvgen.evaluation.placement import placed
from qvgen.evaluation.quality_data import Quality, Sampling, SamplingCost
from qvgen.evaluation.report_data import Checks, VideoComparison
from qvgen.evaluation.sampling_cost import describe_device, measured, memory_source, weight_bytes, weights_dtype
from qvgen.evaluation.video_quality import STILL, find_lpips, video_quality
from qvgen.layers.swap import phi_suspended
from qvgen.models.base import Encode, VideoDiT

log = logging.getLogger(__name__)

VARIANTS = ("teacher", "fake-quantized", "packed")
START = "ptq-start"
BATCH_SIZE = 32


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The results of :func:`compare_models`."""

    checks: Checks
    videos: tuple[VideoComparison, ...]
    quality: Quality
    sampling: Sampling


@dataclass(frozen=True, kw_only=True)
class Start:
    """The PTQ start of a run.

    Attributes:
        restore: Brings the student to it and returns it; None: there is none to sample.
        absent: Why there is none; None: there is.
    """

    restore: Callable[[], nn.Module] | None
    absent: str | None


@dataclass(frozen=True, kw_only=True, eq=False)
class ComparedModels:
    """The models that stand side by side.

    Attributes:
        teacher: The full-precision model.
        fake: The trained model, its Phi gone; where the start is sampled it holds the start afterwards.
        packed: The same, read back from its packed directory.
        start: The PTQ start, or why it is not sampled.
    """

    teacher: nn.Module
    fake: nn.Module
    packed: nn.Module
    start: Start


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """The videos that are shown, and the table's, whose items are of the data, with their seeds."""

    family: VideoDiT
    encode: Encode
    shown: Sequence[PromptedVideo]
    items: Sequence[Mapping[str, Any]]
    seeds: Sequence[int]

    @property
    def captions(self) -> list[str]:
        return [item["caption"] for item in self.items]


def compare_models(
    family: VideoDiT,
    models: ComparedModels,
    *,
    held_out: MeasuredInputs,
    shown: Sequence[PromptedVideo],
    quality_videos: int,
    kept: KeptSamples,
) -> Comparison:
    """Generate with all models, write the shown videos to run_dir/videos, and compare.

    What is sampled is kept in the run's folder until the report is written (:mod:`qvgen.evaluation.kept_samples`).

    Args:
        family: The model family.
        models: What is compared.
        held_out: Inputs on which the outputs of fake and packed are compared; captions of the table's videos.
        shown: The videos that the report shows.
        quality_videos: Number of the table's videos; their seeds begin with that of the held-out inputs.
        kept: The samples in the run's folder.
    """
    items = held_out_items(held_out.split, quality_videos)
    seeds = [held_out.seed + index for index in range(len(items))]
    asked = _Asked(family=family, encode=held_out.split.encode, shown=shown, items=items, seeds=seeds)
    sampled_models = dict(zip(VARIANTS, (models.teacher, models.fake, models.packed), strict=True))
    sampled = {name: kept.get(name, partial(_sample, name, model, asked)) for name, model in sampled_models.items()}
    tables = {name: one.table for name, one in sampled.items()}
    checks = check_packed(models.fake, models.packed, held_out=held_out, videos=tables)
    start = models.start
    start_videos = None if start.restore is None else kept.read(START)
    if start_videos is None:
        start, start_videos = _sample_start(start, asked)
    if start_videos is not None:
        kept.write(START, start_videos)
        sampled = {"teacher": sampled.pop("teacher"), START: start_videos, **sampled}  # as tables and pages show them
    frames = {name: one.shown for name, one in sampled.items()}
    _write_videos(frames, shown, fps=family.fps, directory=kept.run_dir / "videos")
    return Comparison(
        checks=checks,
        videos=_comparisons(frames, asked),
        quality=_quality(sampled, asked, start=start),
        sampling=_sampling(sampled, asked),
    )


def _sample_start(start: Start, asked: _Asked) -> tuple[Start, Sampled | None]:
    """The PTQ start's videos; a start that cannot be read any more costs these alone, and never the report of a run."""
    if start.restore is None:
        return start, None
    try:
        student = start.restore()
    except (ValueError, OSError) as error:
        log.warning("the videos of the PTQ start are left out: %s", error)
        return Start(restore=None, absent=str(error)), None
    with phi_suspended(student):
        return start, _sample(START, student, asked)


def _sample(name: str, model: nn.Module, asked: _Asked) -> Sampled:
    """One model's videos; the table's are timed, when the shown ones have warmed the model up."""
    family, encode, switch = asked.family, asked.encode, find_switch(model)
    with placed(model) as device:
        shown = _sample_shown(family, model, asked.shown, encode=encode)
        if switch is not None:
            switch.history.clear()
        with measured(device) as spent:
            table = generate_videos(family, model, asked.captions, asked.seeds, encode=encode)
        cost = SamplingCost(
            name=name,
            dtype=weights_dtype(model),
            kernels=kernel_names(model),
            seconds_per_video=spent.seconds / len(table),
            weight_bytes=weight_bytes(model),
            working_bytes=spent.working_bytes,
        )
    bits = None if switch is None else switch.mean_bits()
    return Sampled(shown=shown, table=table, cost=cost, activation_bits=bits)


def _comparisons(videos: Mapping[str, Tensor], asked: _Asked) -> tuple[VideoComparison, ...]:
    start = videos.get(START)
    return tuple(
        VideoComparison(
            prompt=video.caption,
            seed=video.seed,
            fps=asked.family.fps,
            teacher=videos["teacher"][index].numpy(),
            start=None if start is None else start[index].numpy(),
            fake_quantized=videos["fake-quantized"][index].numpy(),
            packed=videos["packed"][index].numpy(),
            negative_prompt=video.negative,
        )
        for index, video in enumerate(asked.shown)
    )


def _quality(sampled: Mapping[str, Sampled], asked: _Asked, *, start: Start) -> Quality:
    family, lpips_state = asked.family, find_lpips()
    rows = {
        name: video_quality(
            name, one.table, teacher=sampled["teacher"].table, items=asked.items, lpips_state=lpips_state
        )
        for name, one in sampled.items()
    }
    return Quality(
        variants=tuple(replace(row, activation_bits=sampled[name].activation_bits) for name, row in rows.items()),
        num_videos=len(asked.items),
        num_still_videos=sum(STILL in caption for caption in asked.captions),
        seeds=f"{asked.seeds[0]}..{asked.seeds[-1]}",
        num_steps=family.num_inference_steps,
        guidance_scale=family.guidance_scale,
        negative_prompt=None if family.guidance_scale == 1 else family.negative_prompt,
        lpips_absent=lpips_state.absent,
        start_absent=start.absent,
    )


def _sampling(sampled: Mapping[str, Sampled], asked: _Asked) -> Sampling:
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    warm = "after the shown ones" if asked.shown else "the first use included"
    return Sampling(
        costs=tuple(one.cost for one in sampled.values()),
        device=describe_device(device),
        conditions=(
            f"{len(asked.items)} videos, {warm}; peak memory: all tensors of the model, and {memory_source(device)} "
            "while it sampled beyond what was there before"
        ),
    )


@torch.no_grad()
def generate_videos(
    family: VideoDiT,
    model: nn.Module,
    captions: Sequence[str],
    seeds: Sequence[int],
    *,
    negative_prompts: Sequence[str | None] | None = None,
    encode: Encode | None = None,
) -> Tensor:
    """One video per caption and seed, as the family usually samples: uint8 [B, F, H, W, 3]."""
    with placed(model):
        parts = [
            family.generate(
                model,
                captions[start : start + BATCH_SIZE],
                seeds[start : start + BATCH_SIZE],
                num_steps=family.num_inference_steps,
                guidance_scale=family.guidance_scale,
                negative_prompts=None if negative_prompts is None else negative_prompts[start : start + BATCH_SIZE],
                encode=encode,
            )
            for start in range(0, len(captions), BATCH_SIZE)
        ]
    return torch.cat(parts) if parts else torch.empty(0, 1, 1, 1, 3, dtype=torch.uint8)


def held_out_items(split: Split, count: int) -> list[Mapping[str, Any]]:
    """The first items of a split, from its beginning again where it has fewer."""
    return [split.samples[index % len(split)] for index in range(count)]


def _sample_shown(family: VideoDiT, model: nn.Module, videos: Sequence[PromptedVideo], *, encode: Encode) -> Tensor:
    return generate_videos(
        family,
        model,
        [video.caption for video in videos],
        [video.seed for video in videos],
        negative_prompts=[video.negative for video in videos],
        encode=encode,
    )


def _write_videos(sampled: Mapping[str, Tensor], shown: Sequence[PromptedVideo], *, fps: int, directory: Path) -> None:
    directory.mkdir(exist_ok=True)
    for name, batch in sampled.items():
        for index, video in enumerate(shown):
            path = directory / video_name(index, video.caption, seed=video.seed, variant=name)
            write_video(path, batch[index].numpy(), fps=fps)


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
