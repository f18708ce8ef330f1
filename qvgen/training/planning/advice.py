"""What to change where a run does not fit: each change is counted again, and only those that fit are named.

First every change alone, each as small as fits (sharding over as few devices as fit); if none does, those together that cost
no quality, or the least; then smaller clips too.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from qvgen.training.design.training_run import TrainingRun
from qvgen.training.planning.counted_step import StepSettings
from qvgen.training.planning.memory import USABLE_SHARE, MemoryCounter
from qvgen.training.planning.stored_state import StoredState

_SHARES = (0.75, 0.5, 0.25)
"""Of the clip's frames, or of its height and width."""

SHARDED_DEVICES = (2, 4, 8)
"""Devices of one machine that strategy=fsdp is tried with."""


@dataclass(frozen=True, kw_only=True)
class Change:
    """Overrides that make the run fit, and the bytes that it has then."""

    overrides: str
    total_bytes: int


@dataclass(frozen=True, kw_only=True)
class _Step:
    """Settings that were tried, and the overrides that lead there."""

    overrides: tuple[str, ...]
    settings: StepSettings
    shards: int
    stored: StoredState


def find_changes(
    run: TrainingRun, base: StepSettings, counter: MemoryCounter, *, usable_bytes: int
) -> tuple[list[Change], int]:
    """Changes that fit, and the device memory that the run needs at its own size of clips, in bytes.

    Args:
        run: What is planned.
        base: Settings that do not fit.
        counter: Counts them.
        usable_bytes: What tensors may fill.
    """

    def first_fit(steps: Sequence[_Step]) -> list[Change]:
        """The first of ever smaller settings that fits."""
        index = bisect_left(steps, True, key=lambda step: total(step) <= usable_bytes)
        return [
            Change(overrides=" ".join(step.overrides), total_bytes=total(step)) for step in steps[index : index + 1]
        ]

    def total(step: _Step) -> int:
        return counter.total(step.settings, shards=step.shards, stored=step.stored)

    start = _Step(overrides=(), settings=base, shards=run.shards, stored=counter.stored)
    axes = [_checkpointed(start), _accumulated(run, start), _teacher(run, start), _on_host(run, start)]
    axes += [_regathered(start), _sharded(run, start)]
    small = start
    for axis in (_checkpointed, lambda step: _accumulated(run, step), lambda step: _teacher(run, step)):
        small = (axis(small) or [small])[-1]
    smallest = [small, *_on_host(run, small), *_regathered(small)][-1]
    needed = int(total(smallest) / USABLE_SHARE)
    if counter.weight_bytes(smallest.settings, shards=smallest.shards, stored=smallest.stored) > usable_bytes:
        return first_fit(_sharded(run, start)) or first_fit(_sharded(run, small)), needed
    changes = [change for axis in axes for change in first_fit(axis)]
    if not changes:
        without_teacher = (_accumulated(run, (_checkpointed(start) or [start])[-1]) or [])[-1:]
        together = [small, *_on_host(run, small), *_regathered(small)]
        changes = first_fit(without_teacher) or first_fit([step for step in together if step.overrides])
        changes += first_fit(_sharded(run, small))
    cut_from = start if changes else smallest
    changes += [change for axis in clip_steps(run, cut_from) for change in first_fit(axis)]
    return changes, needed


def _checkpointed(step: _Step) -> list[_Step]:
    if step.settings.gradient_checkpointing and not step.settings.keep_attention:
        return []
    key = "keep_attention=false" if step.settings.gradient_checkpointing else "gradient_checkpointing=true"
    settings = replace(step.settings, gradient_checkpointing=True, keep_attention=False)
    return [replace(step, overrides=(*step.overrides, f"strategy.{key}"), settings=settings)]


def _accumulated(run: TrainingRun, step: _Step) -> list[_Step]:
    share = run.steps.batch.size // run.steps.batch.groups
    sizes = [size for size in range(step.settings.micro_batch - 1, 0, -1) if share % size == 0]
    return [
        replace(
            step,
            overrides=(*step.overrides, f"accumulate={share // size}"),
            settings=replace(step.settings, micro_batch=size),
        )
        for size in sizes
    ]


def _teacher(run: TrainingRun, step: _Step) -> list[_Step]:
    has_choice = "dtype" in run.model.section and run.design.method.needs_teacher
    if not has_choice or step.settings.teacher_dtype != torch.float32:
        return []
    settings = replace(step.settings, teacher_dtype=torch.bfloat16)
    return [replace(step, overrides=(*step.overrides, "model.dtype=bfloat16"), settings=settings)]


def _on_host(run: TrainingRun, step: _Step) -> list[_Step]:
    """Moments, then the teacher's blocks too, on the host, for the same bits; gradients of half the bytes at last."""
    if not step.settings.autocast or step.shards > 1 or not run.design.method.quantizes:
        return []
    found, overrides, stored = [], step.overrides, step.stored
    if not stored.moments_on_host and run.strategy.name != "deepspeed":
        overrides, stored = (*overrides, "optim.offload=true"), replace(stored, moments_on_host=True)
        found.append(replace(step, overrides=overrides, stored=stored))
    if run.design.method.needs_teacher and not stored.teacher_on_host:
        overrides, stored = (*overrides, "strategy.teacher_offload=true"), replace(stored, teacher_on_host=True)
        found.append(replace(step, overrides=overrides, stored=stored))
    if run.devices == 1 and stored.masters == stored.gradients == "float32":
        overrides, stored = (*overrides, "optim.gradients=bfloat16"), replace(stored, gradients="bfloat16")
        settings = replace(step.settings, gradients="bfloat16")
        found.append(replace(step, overrides=overrides, stored=stored, settings=settings))
    return found


def _regathered(step: _Step) -> list[_Step]:
    """Blocks that are gathered again for the backward pass, then all shares on the host: what it costs is time."""
    if step.shards == 1:
        return []
    found, overrides, how = [], step.overrides, step.stored.gathering
    if how.reshard_after_forward is not True:
        how = replace(how, reshard_after_forward=True)
        overrides = (*overrides, "strategy.reshard_after_forward=true")
        found.append(replace(step, overrides=overrides, stored=replace(step.stored, gathering=how)))
    if not how.on_host and step.settings.autocast:  # a CPU's memory is the host's
        stored = replace(step.stored, gathering=replace(how, on_host=True), moments_on_host=True, average_on_host=True)
        found.append(replace(step, overrides=(*overrides, "strategy.cpu_offload=true"), stored=stored))
    return found


def _sharded(run: TrainingRun, step: _Step) -> list[_Step]:
    """FSDP2 over ever more GPUs, with the same micro-batches; the CPU's processes share one memory anyway."""
    if not step.settings.autocast:
        return []
    fewest = step.shards + 1 if step.shards > 1 else max(2, run.devices)
    others = [override for override in step.overrides if not override.startswith("accumulate=")]
    micro_batch, size, context = step.settings.micro_batch, run.steps.batch.size, run.steps.batch.context
    return [
        replace(
            step,
            overrides=(
                *others,
                f"devices={count}",
                "strategy=fsdp",
                f"accumulate={size * context // (count * micro_batch)}",
            ),
            shards=count,
        )
        for count in SHARDED_DEVICES
        if count >= fewest and count % context == 0 and size * context % (count * micro_batch) == 0
    ]


def clip_steps(run: TrainingRun, step: _Step) -> list[list[_Step]]:
    """Clips of ever fewer frames, and ever smaller ones."""
    size = {**clip_size(run), **dict(step.settings.model_changes)}
    temporal, spatial = getattr(run.model.family, "compression", (1, 1))
    multiple = spatial * getattr(run.model.family, "patch_size", 4)
    sides = [key for key in size if key != "num_frames"]
    fewer, smaller = [], []
    for share in _SHARES:
        frames = round(share * (size["num_frames"] - 1) / temporal) * temporal + 1
        fewer.append({**size, "num_frames": frames})
        smaller.append({**size, **{side: max(1, round(share * size[side] / multiple)) * multiple for side in sides}})
    return [
        [_resized(run, step, changed) for changed in axis if changed != size and _takes(run, changed)]
        for axis in (fewer, smaller)
    ]


def _takes(run: TrainingRun, size: Mapping[str, int]) -> bool:
    """Whether the family is made for clips of a size: one may have positions for a fixed number of frames."""
    try:
        run.model.rebuild(size)
    except ValueError:
        return False
    return True


def clip_size(run: TrainingRun) -> dict[str, int]:
    """Frames and sides of the largest clips that are trained on, as arguments of the family."""
    keys = ("num_frames", "height", "width", "image_size")
    family = run.model.family
    size = {key: int(getattr(family, key)) for key in keys if hasattr(family, key)}
    if run.data is not None and hasattr(run.data, "cut_settings") and "height" in size:
        buckets = run.data.cut_settings(family).buckets
        largest = max(buckets, key=lambda bucket: bucket.frames * bucket.height * bucket.width)
        size = {"num_frames": largest.frames, "height": largest.height, "width": largest.width}
    return size


def _resized(run: TrainingRun, step: _Step, size: dict[str, Any]) -> _Step:
    before = clip_size(run)
    if getattr(run.data, "buckets", None):
        changes = [f"'data.buckets=[{size['num_frames']}x{size['height']}x{size['width']}]'"]
    else:
        changes = [f"model.{key}={value}" for key, value in size.items() if value != before[key]]
    settings = replace(step.settings, model_changes=tuple(size.items()))
    return replace(step, overrides=(*step.overrides, *changes), settings=settings)
