"""The sections of a configuration (`phi.*`, `optim.*`, ...), with the meaning, unit and range of every knob.

A range is checked where the field stands, on construction, so no object with a bad value exists. What only a model
can know (is this rank too large for that layer?) is checked where the model is.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

from qvgen.config.prompt import Prompts
from qvgen.errors import UserError


def require(condition: bool, message: str) -> None:
    """Raise UserError with ``message`` unless ``condition`` holds."""
    if not condition:
        raise UserError(message)


def positive(**values: int | float | None) -> None:
    """Raise UserError for the first value that is not above 0; a keyword ``a__b`` stands for the key ``a.b``."""
    for key, value in values.items():
        require(value is None or value > 0, f"{key.replace('__', '.')}={value} must be greater than 0")


@dataclass(frozen=True, kw_only=True)
class Names:
    """What was chosen from each group of conf/: names for paths, tables and reports."""

    model: str
    profile: str
    method: str
    init: str
    data: str
    experiment: str | None


@dataclass(frozen=True, kw_only=True)
class PhiConfig:
    """The low-rank helper and its way out.

    Attributes:
        rank: Columns of L at the start; > 0.
        ranks: Rank of each phase, strictly decreasing and positive; stands in place of rank and decay.
        decay: Share of the components that one phase takes away, in (0, 1].
        anneal: How the gate of those components falls from 1 to 0.
        tail_share: Share of the steps that is left for training without Phi, in [0, 1).
        drop: Which components go first.
    """

    rank: int
    ranks: tuple[int, ...] | None
    decay: float
    anneal: Literal["cosine", "linear"]
    tail_share: float
    drop: Literal["smallest", "largest"]

    def __post_init__(self) -> None:
        require(self.rank > 0, f"phi.rank={self.rank} must be positive; write for example phi.rank=32")
        require(0 < self.decay <= 1, f"phi.decay={self.decay} is outside (0, 1]; write for example phi.decay=0.5")
        require(
            0 <= self.tail_share < 1,
            f"phi.tail_share={self.tail_share} is outside [0, 1); write for example phi.tail_share=0.1",
        )
        if self.ranks is not None:
            shown = ",".join(map(str, self.ranks))
            falling = all(a > b for a, b in zip(self.ranks, self.ranks[1:], strict=False))
            require(
                bool(self.ranks) and falling and self.ranks[-1] > 0,
                f"phi.ranks=[{shown}] must be positive and strictly decreasing; write for example phi.ranks=[32,8,2]",
            )


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimizer and its schedule.

    Attributes:
        name: The optimizer; adamw.
        learning_rate: Peak rate of weights, scales, zero points, L and R; > 0.
        clip_learning_rate: Peak rate of the activations' learned clips; > 0.
        betas: Decay of the two moments, each in [0, 1).
        eps: Added to the root of the second moment; > 0.
        weight_decay: On weights, L and R only; >= 0.
        warmup_share: Share of the steps with linear warm-up, in [0, 1]; the rest decays by cosine.
        gradient_clip: Largest norm of all gradients; > 0.
    """

    name: Literal["adamw"]
    learning_rate: float
    clip_learning_rate: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    warmup_share: float
    gradient_clip: float

    def __post_init__(self) -> None:
        positive(
            optim__learning_rate=self.learning_rate,
            optim__clip_learning_rate=self.clip_learning_rate,
            optim__eps=self.eps,
            optim__gradient_clip=self.gradient_clip,
        )
        for beta in self.betas:
            require(
                0 <= beta < 1,
                f"optim.betas={list(self.betas)} must lie in [0, 1); write for example [0.9,0.95]",
            )
        require(self.weight_decay >= 0, f"optim.weight_decay={self.weight_decay} is negative; write 0 for none")
        require(0 <= self.warmup_share <= 1, f"optim.warmup_share={self.warmup_share} is outside [0, 1]")


@dataclass(frozen=True, kw_only=True)
class StrategyConfig:
    """How processes share the work, and what they give for memory.

    Attributes:
        name: ``single``, ``ddp`` (every process holds everything) or ``fsdp`` (weights, gradients, moments and teacher are
            shared out over the processes).
        gradient_checkpointing: Keep only the blocks' inputs and compute the rest again in the backward pass: the same bits
            for about a third more time.
        threads: CPU threads of each process, from the PTQ start to the report; > 0. The last bit of a sum depends on how
            many share it, so the environment (OMP_NUM_THREADS) has no say: a run is the same on every machine.
    """

    name: Literal["single", "ddp", "fsdp"]
    gradient_checkpointing: bool
    threads: int

    def __post_init__(self) -> None:
        positive(strategy__threads=self.threads)


@dataclass(frozen=True, kw_only=True)
class LoggerConfig:
    """Where metrics go besides metrics.csv, which is always written.

    Attributes:
        name: ``wandb`` or ``csv`` (nothing besides).
        project: Project name at Weights & Biases.
        group: Of its runs; None: one for each sweep, none for a single run.
        tags: Further tags of the run; model, bits, method, init and profile always are.
    """

    name: Literal["wandb", "csv"]
    project: str | None
    group: str | None
    tags: tuple[str, ...]

    @property
    def mode(self) -> str:
        """Mode of wandb: ``WANDB_MODE`` if set, else online where there is a key and offline where there is none."""
        return os.environ.get("WANDB_MODE") or ("online" if os.environ.get("WANDB_API_KEY") else "offline")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """How often a run can be resumed from.

    Attributes:
        every_steps: Optimizer steps between two checkpoints; > 0.
        every_minutes: Also after so many minutes without one; > 0; None: by steps alone.
        keep: How many of the newest are kept; > 0.
    """

    every_steps: int
    every_minutes: float | None
    keep: int

    def __post_init__(self) -> None:
        positive(
            checkpoint__every_steps=self.every_steps,
            checkpoint__every_minutes=self.every_minutes,
            checkpoint__keep=self.keep,
        )


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """What the processes of a run are watched for.

    Attributes:
        hang_minutes: A run of several processes ends after so many minutes in which none of them reported anything; > 0;
            None: it waits for days.
    """

    hang_minutes: float | None

    def __post_init__(self) -> None:
        positive(training__hang_minutes=self.hang_minutes)


@dataclass(frozen=True, kw_only=True)
class CalibrationConfig:
    """What a PTQ method that needs statistics sees of the full-precision model; data-free methods sample nothing.

    Attributes:
        prompts: Of its videos: captions, or a file of them (:mod:`qvgen.config.prompt`); None: the evaluation's.
        videos: Videos that are sampled for it; > 0. They take the prompts in turn.
        steps: Sampling steps of each; > 0.
        memory_gib: Of the statistics of one pass; > 0. What does not fit is collected in further passes.
        cache: Folder of statistics, keyed by content.
    """

    prompts: Prompts | None
    videos: int
    steps: int
    memory_gib: float
    cache: str

    def __post_init__(self) -> None:
        positive(
            calibration__videos=self.videos,
            calibration__steps=self.steps,
            calibration__memory_gib=self.memory_gib,
        )


@dataclass(frozen=True, kw_only=True)
class ActivationSwitchConfig:
    """A policy that changes activation bits while a video is sampled (delta-GBS, :mod:`qvgen.deploy.delta_switch`).

    Attributes:
        widths: The two widths, one of them that of ``bits``; None: no policy. Training draws one of them for each sample.
        delta: Sum of the outputs' relative changes from which a step runs at the larger width; >= 0.
    """

    widths: tuple[int, ...] | None
    delta: float

    def __post_init__(self) -> None:
        require(self.delta >= 0, f"activation_switch.delta={self.delta} is negative; write for example 0.12")
        require(
            self.widths is None or (len(self.widths) == 2 and 2 <= self.widths[0] < self.widths[1] <= 8),
            f"activation_switch.widths={list(self.widths or ())} must be two rising widths in 2..8; write [4,8]",
        )


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """What is measured and shown at the end.

    Attributes:
        samples: Held-out inputs of the relative error; > 0. `qvgen ptq` takes 0: then nothing at all is sampled or measured.
        quality_videos: Videos of each kind for the report's table, with held-out captions; > 0.
        prompts: Of the videos: captions, or a file of them (:mod:`qvgen.config.prompt`); None: the model's own.
        videos: Number of videos of each kind; >= 0. They take the prompts in turn.
        start_videos: Sample the PTQ start too, beside the trained model: a fourth model where there are three.
        every_steps: Also measure every so many optimizer steps; None: only at the end.
        video_every_steps: Sample validation videos of the same prompts every so many optimizer steps; None: never.
    """

    samples: int
    quality_videos: int
    prompts: Prompts | None
    videos: int
    start_videos: bool
    every_steps: int | None
    video_every_steps: int | None

    def __post_init__(self) -> None:
        require(
            self.samples >= 0, f"evaluation.samples={self.samples} is negative; write 0 to measure nothing (qvgen ptq)"
        )
        positive(evaluation__quality_videos=self.quality_videos if self.samples else None)
        positive(evaluation__every_steps=self.every_steps, evaluation__video_every_steps=self.video_every_steps)
        require(self.videos >= 0, f"evaluation.videos={self.videos} is negative; write 0 for none")
