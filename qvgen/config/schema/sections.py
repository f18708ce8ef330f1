"""The sections of a configuration (`phi.*`, `optim.*`, ...), with the meaning, unit and range of every knob.

This is the one home of a knob's meaning (its line in the class's docstring) and of its range (beside its type); its default
stands in conf/. ``--help`` and docs/configuration.md are made from all three (:mod:`qvgen.config.reference`). A range is
checked on construction, so no object with a bad value exists. What only a model can know (is this rank too large for that
layer?) is checked where the model is.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from qvgen.config.processes import launched_world
from qvgen.config.prompts.prompt import Prompts
from qvgen.config.schema.learning_rate_tail import LearningRateTail
from qvgen.config.schema.may_differ import MayDiffer
from qvgen.config.schema.value_range import Range, check_ranges
from qvgen.errors import UserError


def require(condition: bool, message: str) -> None:
    """Raise UserError with ``message`` unless ``condition`` holds."""
    if not condition:
        raise UserError(message)


def require_groups(devices: int, context_parallel: int) -> None:
    """Raise UserError where processes can't be divided into groups that sample one video together."""
    if context_parallel > 1 and (world := launched_world.current()) is not None:
        raise UserError(
            f"context_parallel={context_parallel}: {world.launcher} started {world.size} processes, each of which samples "
            "whole videos; groups are made by a plain start on one machine: start it once, with plain python and "
            f"devices={context_parallel} context_parallel={context_parallel}, or leave context_parallel out"
        )
    require(
        devices % context_parallel == 0,
        f"context_parallel={context_parallel}: a plain start on one machine is divided into groups of so many processes, and "
        f"devices={devices} can't be; write for example devices={context_parallel}",
    )


PHI_DECAY = Range("[0, 1]", write="0.5")
PhiTailShare = Annotated[float, Range("[0, 1)", write="0.1")]
"""Also the ranges of the schedule (:mod:`qvgen.lowrank.decay`), which can be built without a configuration."""


@dataclass(frozen=True, kw_only=True)
class Names:
    """The option that was chosen from each group of conf/: names for paths, tables and reports."""

    model: str
    profile: str
    method: str
    init: str
    data: str
    export: Annotated[tuple[str, ...] | None, MayDiffer.FREE]
    experiment: Annotated[str | None, MayDiffer.FREE]


@dataclass(frozen=True, kw_only=True)
class PhiConfig:
    """The low-rank helper and its way out.

    Attributes:
        rank: Number of components of Phi (columns of L) at the start.
        ranks: Rank of each phase, positive and strictly decreasing, for example [32,8,2]; it stands in place of rank and
            decay. None: rank, rank * decay, ... down to 1.
        decay: Share of the components that one phase takes away; 0: none ever, all ``rank`` stay, which needs ``keep``.
        anneal: How the gate of the components that a phase takes away falls from 1 to 0: ``cosine``, ``linear``, or by a
            ``step`` in the middle of the phase.
        tail_share: Share of the steps that train without Phi at the end, after all of its components are gone.
        drop: Which components a phase takes away, by singular value, or ``random`` ones, others for each layer and phase.
        start: What Phi is before the first step: ``svd``, the best approximation of what the weight's grid loses; ``random``,
            Gaussian factors whose product is as large; ``zero``, a product of 0, with R as for ``random``.
        input: What Phi is multiplied with: the ``quantized`` input, as published, or the ``full`` one, as it comes before it
            is quantized, with factors in bfloat16. With ``keep`` it is always the full one.
        keep: True ends the decay at ``keep_rank``: Phi stays as a low-rank branch of every packed layer, and acts from the
            first step on as branches do everywhere, with factors in bfloat16 on the input before it is quantized. A training
            that is stopped before keeps what Phi is then.
        keep_rank: Components that stay with ``keep``; all of them where there are fewer, or where ``decay`` is 0. Runtimes
            take multiples of 16.
    """

    rank: Annotated[int, Range("> 0", write="32")]
    ranks: tuple[int, ...] | None
    decay: Annotated[float, PHI_DECAY]
    anneal: Literal["cosine", "linear", "step"]
    tail_share: PhiTailShare
    drop: Literal["smallest", "largest", "random"]
    start: Literal["svd", "random", "zero"]
    input: Literal["quantized", "full"]
    keep: bool
    keep_rank: Annotated[int, Range("> 0", write="16")]

    def __post_init__(self) -> None:
        check_ranges(self, section="phi")
        require(
            self.decay > 0 or self.keep or self.ranks is not None,
            "phi.decay=0 takes nothing away, and a model with Phi can be folded with keep alone; write phi.keep=true too",
        )
        if self.ranks is not None:
            shown = ",".join(map(str, self.ranks))
            falling = all(a > b for a, b in zip(self.ranks, self.ranks[1:], strict=False))
            require(
                bool(self.ranks) and falling and self.ranks[-1] > 0,
                f"phi.ranks=[{shown}] must be positive and strictly decreasing; write for example phi.ranks=[32,8,2]",
            )


@dataclass(frozen=True, kw_only=True)
class OptimConfig(LearningRateTail):
    """The optimizer and its schedule.

    Attributes:
        name: ``adamw``, or ``adamw_8bit``: the same with two moments of 8 bits each for the weights of quantized layers, one
            scale for up to 256 of them in a row (torchao's; ``pip install 'torchao>=0.18,<0.19'``).
        masters: Type of the weights of quantized layers between steps. ``bfloat16`` halves them: a step is computed in
            float32 and rounded up or down at random, so that small steps are not lost. The draw depends on seed, step and
            weight alone.
        gradients: Type in which the gradients of these weights are added up over micro-batches.
        offload: Keep the moments in the host's memory; in each step they come to the device tensor by tensor and go back, for
            the same bits.
        learning_rate: Peak learning rate of weights, scales, zero points, L and R.
        clip_learning_rate: Peak learning rate of the activations' learned clip factors.
        betas: Decay rates of the two moments of AdamW.
        eps: Number that is added to the root of the second moment, so that nothing is divided by 0.
        weight_decay: Decoupled weight decay of weights, L and R; scales, zero points and clip factors have none.
        warmup_share: Share of the steps in which the learning rate rises linearly; afterwards it falls by a cosine.
        gradient_clip: Largest norm that all gradients together may have; larger ones are scaled down to it. None: gradients
            are taken as they are.
        zero_point_gradient: Gradient that a token's minimum and clips get through its zero point, where ranges are taken at
            run time. ``through``: straight through the rounding; ``stop``: none, as in the QVGen release.
    """

    name: Literal["adamw", "adamw_8bit"]
    masters: Literal["float32", "bfloat16"]
    gradients: Literal["float32", "bfloat16"]
    offload: bool
    learning_rate: Annotated[float, Range("> 0")]
    clip_learning_rate: Annotated[float, Range("> 0")]
    betas: Annotated[tuple[float, float], Range("[0, 1)", write="[0.9,0.95]")]
    eps: Annotated[float, Range("> 0")]
    weight_decay: Annotated[float, Range(">= 0", write="0")]
    warmup_share: Annotated[float, Range("[0, 1]")]
    gradient_clip: Annotated[float | None, Range("> 0")]
    zero_point_gradient: Literal["through", "stop"]

    def __post_init__(self) -> None:
        check_ranges(self, section="optim")
        self.check_tail(warmup_share=self.warmup_share)


@dataclass(frozen=True, kw_only=True)
class LoggerConfig:
    """Where metrics go besides metrics.csv, which is always written.

    Attributes:
        name: ``wandb`` (Weights & Biases, in run_dir/wandb too) or ``csv`` (nothing besides metrics.csv).
        project: Project name at Weights & Biases.
        group: Group of the runs at Weights & Biases; None: one group for each sweep (-m), none for a single run.
        tags: Tags of the run besides its model, bits, method, init and profile, which it always has.
        upload: Files that wandb gets when the run is done: ``report`` (report.html, report.json, and the names and checksums
            of the packed files), ``packed`` (those files too, as large as the packed model is) or ``nothing``.
        further: Lightning loggers: sections with a ``_target_`` by name, the objects once they are built.
    """

    name: Literal["wandb", "csv"]
    project: str | None
    group: str | None
    tags: tuple[str, ...]
    upload: Literal["nothing", "report", "packed"]
    further: Any

    @property
    def mode(self) -> str:
        """Mode of wandb: ``WANDB_MODE`` if set, else online where there is a key and offline where there is none."""
        return os.environ.get("WANDB_MODE") or ("online" if os.environ.get("WANDB_API_KEY") else "offline")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """How often a run can be resumed from.

    Attributes:
        every_steps: Optimizer steps between two checkpoints.
        every_minutes: A checkpoint is also written after so many minutes without one; None: by steps alone.
        keep: How many of the newest checkpoints are kept.
    """

    every_steps: Annotated[int, Range("> 0")]
    every_minutes: Annotated[float | None, Range("> 0")]
    keep: Annotated[int, Range("> 0")]

    def __post_init__(self) -> None:
        check_ranges(self, section="checkpoint")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How the processes of a run are watched.

    Attributes:
        hang_minutes: A run of several processes ends after so many minutes in which none of them reported anything; None:
            it waits for days.
    """

    hang_minutes: Annotated[float | None, Range("> 0")]

    def __post_init__(self) -> None:
        check_ranges(self, section="training")


@dataclass(frozen=True, kw_only=True)
class CalibrationConfig:
    """The videos and statistics by which a PTQ method sees the full-precision model; without need of them none is sampled.

    Attributes:
        prompts: Captions of the videos that are sampled for calibration: a list, or a file with one to a line, or .jsonl with
            seeds and negative prompts (:mod:`qvgen.config.prompts`); None: those of ``evaluation.prompts``.
        videos: Number of videos that the full-precision model samples; they take the prompts in turn.
        steps: Sampling steps of each video.
        memory_gib: Memory of the statistics of one pass in GiB; layers that do not fit are seen in further passes. From the
            second video on the host holds the sums of those before besides, as large again.
        cache: Folder of statistics, keyed by content; runs may share it.
        clips: Where learned clips of inputs start. ``search``: where the error of a layer's output on sampled inputs is
            least; ``table``: where inputs of its width and bits lose least that are Gaussian, or GELU or SiLU of it;
            ``auto``: ``search`` for a method that samples inputs anyway, else ``table``.
    """

    prompts: Prompts | None
    videos: Annotated[int, Range("> 0")]
    steps: Annotated[int, Range("> 0")]
    memory_gib: Annotated[float, Range("> 0")]
    cache: Annotated[str, MayDiffer.FREE]
    clips: Literal["auto", "search", "table"]

    def __post_init__(self) -> None:
        check_ranges(self, section="calibration")


@dataclass(frozen=True, kw_only=True)
class ActivationSwitchConfig:
    """A policy that changes activation bits while a video is sampled (delta-GBS, :mod:`qvgen.deploy.delta_switch`).

    Attributes:
        widths: The two widths in bits, rising, in 2..8, one of them that of ``bits``, for example [4,8] with bits=w4a4; None:
            one width. Training draws one of them for each sample.
        delta: Sum of the outputs' relative changes from which a step runs at the larger width; a larger number runs fewer
            steps at it.
    """

    widths: tuple[int, ...] | None
    delta: Annotated[float, Range(">= 0", write="0.12")]

    def __post_init__(self) -> None:
        check_ranges(self, section="activation_switch")
        require(
            self.widths is None or (len(self.widths) == 2 and 2 <= self.widths[0] < self.widths[1] <= 8),
            f"activation_switch.widths={list(self.widths or ())} must be two rising widths in 2..8; write [4,8]",
        )


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Measurements and videos of a run, at its end and on the way.

    Attributes:
        samples: Held-out inputs of the relative error. `qvgen ptq` alone takes 0: then nothing is sampled or measured.
        quality_videos: Videos of each model for the report's table of quality, with held-out captions; greater than 0 where
            anything is measured.
        prompts: Captions of the videos: a list, or a file of them (:mod:`qvgen.config.prompts`); None: the model's own.
        videos: Number of videos of each model in the report; they take the prompts in turn. 0: none.
        start_videos: True also samples the PTQ start, before training: a fourth model where there are three.
        every_steps: Measure every so many optimizer steps too; None: only at the end.
        video_every_steps: Sample validation videos of the same prompts every so many optimizer steps; None: never.
        suite: Measure the validation videos beside the teacher's by the metrics of this suite too (a file of conf/suite);
            None: PSNR and SSIM alone.
    """

    samples: Annotated[int, Range(">= 0", write="64")]
    quality_videos: Annotated[int, Range(">= 0")]
    prompts: Prompts | None
    videos: Annotated[int, Range(">= 0", write="0")]
    start_videos: bool
    every_steps: Annotated[int | None, Range("> 0")]
    video_every_steps: Annotated[int | None, Range("> 0")]
    suite: str | None

    def __post_init__(self) -> None:
        check_ranges(self, section="evaluation")
        require(
            self.quality_videos > 0 or not self.samples,
            f"evaluation.quality_videos={self.quality_videos} must be greater than 0",
        )
