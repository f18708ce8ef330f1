"""The speed of a training step: seconds, clips and tokens per second, and the share of the devices' peak (MFU).

    system/step_seconds        from the step's first forward pass until its numbers are known: without loading, checkpoints,
                               measurements and videos
    system/clips_per_second    samples of the step, over all devices, in each of those seconds
    system/tokens_per_second   tokens of those clips: patches of their latents, as the transformer's blocks see them; those of
                               captions are not counted
    system/mfu                 operations that the step needs, over what all devices could do in those seconds

Operations are the products that a plan counts (:mod:`qvgen.training.planning.operation_counter`), without what gradient
checkpointing computes again (model FLOPs utilization: PaLM, arXiv 2204.02311, appendix B). Only clips of the size that was
counted have an MFU, and only devices whose peak in bfloat16 stands below. Time is taken where the step's numbers are read
anyhow: no device is waited for.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from qvgen.errors import one_line
from qvgen.models.base import VideoDiT
from qvgen.training.design.training_run import TrainingRun
from qvgen.training.planning.advice import clip_size
from qvgen.training.planning.counted_step import count_step
from qvgen.training.planning.memory import Device, find_device
from qvgen.training.planning.training_plan import step_settings

log = logging.getLogger(__name__)

FIGURE_COLUMNS = ("system/step_seconds", "system/clips_per_second", "system/tokens_per_second", "system/mfu")

PEAK_FLOPS = {
    "NVIDIA H200": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA A100": 312e12,
}
"""Operations per second in bfloat16, dense, by the beginning of the name that CUDA gives: NVIDIA's data sheets."""


@dataclass(frozen=True, kw_only=True)
class Speed:
    """The numbers that the figures of a run's steps follow from.

    Attributes:
        batch_size: Samples of a step, over all devices.
        devices: Processes.
        patch: Latent frames, rows and columns of a token; None: a model that does not say, and no tokens.
        sample_numel: Values of the samples whose operations were counted.
        sample_flops: Operations of such a sample; None: no MFU.
        peak_flops: Operations per second that one device could do; None: no MFU.
    """

    batch_size: int
    devices: int
    patch: tuple[int, int, int] | None = None
    sample_numel: int = 0
    sample_flops: float | None = None
    peak_flops: float | None = None


class StepFigures:
    """The figures of one optimizer step after another.

    Args:
        speed: What decides them.
        clock: Seconds.

    Example:
        >>> times = iter((10.0, 12.0))
        >>> speed = Speed(batch_size=8, devices=2, patch=(1, 2, 2), sample_numel=24, sample_flops=3e12, peak_flops=24e12)
        >>> figures = StepFigures(speed, clock=lambda: next(times))
        >>> figures.begin({"video": torch.zeros(2, 2, 3, 2, 2)})
        >>> figures.begin({"video": torch.zeros(2, 2, 3, 2, 2)})  # the second micro-batch
        >>> list(figures.end().values())
        [2.0, 4.0, 12.0, 0.25]
    """

    def __init__(self, speed: Speed, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._speed, self._clock = speed, clock
        self._began: float | None = None
        self._is_counted = True
        self._samples = self._tokens = 0

    def begin(self, batch: Mapping[str, Any]) -> None:
        """A micro-batch begins: ``video`` [B, C, F, H, W] is looked at."""
        if self._began is None:
            self._began, self._is_counted = self._clock(), True
            self._samples = self._tokens = 0
        self._samples += len(batch["video"])
        if (patch := self._speed.patch) is not None:
            sides = zip(batch["video"].shape[2:], patch, strict=True)
            self._tokens += len(batch["video"]) * math.prod(-(-side // size) for side, size in sides)
        self._is_counted = self._is_counted and batch["video"][0].numel() == self._speed.sample_numel

    def end(self) -> dict[str, float]:
        """A step's numbers are known: its figures by column, as far as there are any."""
        if self._began is None:
            return {}
        seconds, self._began = self._clock() - self._began, None
        speed = self._speed
        if seconds <= 0:
            return {}
        row = {"system/step_seconds": seconds, "system/clips_per_second": speed.batch_size / seconds}
        if self._tokens:  # of this process's samples; the others have clips of the same shapes
            row["system/tokens_per_second"] = self._tokens * speed.batch_size / self._samples / seconds
        if self._is_counted and speed.sample_flops is not None and speed.peak_flops is not None:
            reached = speed.batch_size * speed.sample_flops / seconds
            row["system/mfu"] = reached / (speed.devices * speed.peak_flops)
        return row


def peak_flops(name: str) -> float | None:
    """Operations per second of a device in bfloat16; None for one that is not known.

    Example:
        >>> peak_flops("NVIDIA A100-SXM4-80GB"), peak_flops("the CPU of this host")
        (312000000000000.0, None)
    """
    return next((peak for start, peak in PEAK_FLOPS.items() if name.startswith(start)), None)


def patch_of(family: VideoDiT) -> tuple[int, int, int] | None:
    """Latent frames, rows and columns of one token; None for a model that does not say so as Wan and CogVideoX do."""
    patch = family.transformer_config.get("patch_size")
    if isinstance(patch, int):
        return (family.transformer_config.get("patch_size_t") or 1, patch, patch)
    return None if patch is None or len(patch) != 3 else (int(patch[0]), int(patch[1]), int(patch[2]))


def speed_of(run: TrainingRun, *, is_first: bool) -> Speed:
    """The numbers for a run on this machine; says why there is no MFU.

    Args:
        run: The run.
        is_first: This is rank 0, whose figures are shown; the others count nothing.
    """
    device = find_device(None, devices=run.node_devices)
    known = Speed(batch_size=run.steps.batch.size, devices=run.devices, patch=patch_of(run.model.family))
    if not is_first:
        return known
    peak = peak_flops(device.name)
    if peak is None:
        log.info("system/mfu is left out: no peak speed is known of %s", device.name)
        return known
    try:
        return counted_speed(run, device, peak=peak)
    except (RuntimeError, ValueError, TypeError) as error:  # a model that trains need not run without values
        log.info("system/mfu is left out: the operations of a step can't be counted (%s)", one_line(error))
        return known


def counted_speed(run: TrainingRun, device: Device, *, peak: float) -> Speed:
    """The same for a device of a known peak: operations of a sample are counted, without values; no weights are read."""
    settings = step_settings(run, device)
    with torch.random.fork_rng(devices=[]):  # a run has the same bits with and without it
        count = count_step(run.model, run.design, settings, optim=run.steps.optim, is_checked=False)
    return Speed(
        batch_size=run.steps.batch.size,
        devices=run.devices,
        patch=patch_of(run.model.family),
        sample_numel=math.prod(run.model.rebuild(clip_size(run)).sample_shape),
        sample_flops=(count.flops - count.recompute_flops) / settings.micro_batch,
        peak_flops=peak,
    )
