"""The frozen dataclass that each verb receives, with the meaning and range of every top-level key.

Fields of type ``Any`` are leaves: plain dicts with a ``_target_`` until :func:`qvgen.config.leaves.build_leaves`
has replaced them with the objects.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from qvgen.config.bits import Bits
from qvgen.config.sections import (
    CalibrationConfig,
    CheckpointConfig,
    EvaluationConfig,
    LoggerConfig,
    Names,
    OptimConfig,
    PhiConfig,
    StrategyConfig,
    positive,
    require,
)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that `qvgen train` needs.

    Attributes:
        model: The model family's VideoDiT object.
        bits: Bit-widths of weights and activations.
        profile: :class:`qvgen.quant.grid.Profile`, the two grids and the rotation.
        method: What is trained and how.
        init: Where the scales and zero points start.
        data: Factory of data sets: ``data(split=..., seed=...)``.
        optim: The optimizer and its schedule.
        strategy: One process or several.
        logger: Where metrics go.
        seed: Seed of everything random; >= 0.
        steps: Optimizer steps; 0 only where nothing is trained.
        batch_size: Samples per optimizer step over all devices and micro-batches.
        accumulate: Micro-batches per optimizer step; >= 1.
        devices: Processes; >= 1.
        device_memory_gib: Memory of each device that will train, for the plan alone; > 0; None: this machine's.
        kernel: Backend of the packed model; ``auto`` picks the best one that is there.
        run_dir: The run's folder.
        resume: Continue the run in run_dir.
        dry_run: Build and check everything, train nothing.
        debug: Show tracebacks.
        phi: The low-rank helper.
        calibration: What a PTQ method sees of the full-precision model.
        checkpoint: How often a run can be resumed from.
        evaluation: What is measured and shown.
        names: What was chosen from each group.
        plain: All of the above as a plain dict, as config.yaml holds it and :func:`qvgen.config.build.build` reads it.
    """

    model: Any
    bits: Bits
    profile: Any
    method: Any
    init: Any
    data: Any
    optim: OptimConfig
    strategy: StrategyConfig
    logger: LoggerConfig
    seed: int
    steps: int
    batch_size: int
    accumulate: int
    devices: int
    device_memory_gib: float | None
    kernel: str
    run_dir: Path
    resume: bool
    dry_run: bool
    debug: bool
    phi: PhiConfig
    calibration: CalibrationConfig
    checkpoint: CheckpointConfig
    evaluation: EvaluationConfig
    names: Names
    plain: dict[str, Any]

    def __post_init__(self) -> None:
        require(0 <= self.seed < 2**32, f"seed={self.seed} is outside 0..{2**32 - 1}")
        require(
            self.steps > 0 or (self.steps == 0 and self.names.method == "ptq"),
            f"steps={self.steps} must be greater than 0; method=ptq alone trains nothing (qvgen ptq)",
        )
        positive(batch_size=self.batch_size, accumulate=self.accumulate, devices=self.devices)
        positive(device_memory_gib=self.device_memory_gib)
        require(
            self.devices == 1 or self.strategy.name == "ddp",
            f"devices={self.devices} needs more than one process; write devices={self.devices} strategy=ddp",
        )
        parts = self.devices * self.accumulate
        require(
            self.batch_size % parts == 0,
            f"batch_size={self.batch_size} cannot be divided by devices={self.devices} x accumulate={self.accumulate}; "
            f"write for example batch_size={max(1, round(self.batch_size / parts)) * parts}",
        )


@dataclass(frozen=True, kw_only=True)
class FoldConfig:
    """Everything that `qvgen fold` needs.

    Attributes:
        run_dir: The run's folder.
        run: The configuration that the run was started with.
        out: Where the packed directory goes.
        dry_run: Say what would be done.
        debug: Show tracebacks.
    """

    run_dir: Path
    run: TrainConfig
    out: Path
    dry_run: bool
    debug: bool


@dataclass(frozen=True, kw_only=True)
class ModelName:
    """The model of `qvgen generate`; None: what the packed directory says."""

    model: str | None


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """Everything that `qvgen generate` needs.

    Attributes:
        packed: A packed directory, or the two of a model with two experts; None: full precision.
        model: The model's section, plain; None: what the packed directory says.
        prompt: Captions; None: the model's own.
        seed: One video is made for each caption and seed.
        num_steps: Sampling steps, > 0; None: the model's own.
        guidance_scale: Classifier-free guidance, >= 0; None: the model's own.
        out: Where the mp4 files go.
        kernel: Backend; ``auto`` picks the best one that is there.
        dry_run: Say what would be done.
        debug: Show tracebacks.
        names: What was chosen.
        typed: The command line's overrides.
    """

    packed: tuple[Path, ...] | None
    model: dict[str, Any] | None
    prompt: tuple[str, ...] | None
    seed: tuple[int, ...]
    num_steps: int | None
    guidance_scale: float | None
    out: Path
    kernel: str
    dry_run: bool
    debug: bool
    names: ModelName
    typed: tuple[str, ...]

    def __post_init__(self) -> None:
        require(
            self.packed is not None or self.names.model is not None,
            "packed is missing; write packed=DIR, or model=NAME model.path=FOLDER for the full-precision model",
        )
        require(self.packed is None or 1 <= len(self.packed) <= 2, "packed=[...] takes one directory or two")
        require(self.prompt is None or bool(self.prompt), "prompt=[] is empty; write null or captions")
        require(bool(self.seed), "seed=[] is empty; write for example seed=42")
        for seed in self.seed:
            require(0 <= seed < 2**32, f"seed={seed} is outside 0..{2**32 - 1}")
        positive(num_steps=self.num_steps)
        require(
            self.guidance_scale is None or self.guidance_scale >= 0,
            f"guidance_scale={self.guidance_scale} is negative",
        )


@dataclass(frozen=True, kw_only=True)
class InspectConfig:
    """Everything that `qvgen inspect` needs: one of the two folders.

    Attributes:
        packed: A packed directory.
        run_dir: A run's folder, in place of its packed directory.
        dry_run: Say what would be read.
        debug: Show tracebacks.
    """

    packed: Path | None
    run_dir: Path | None
    dry_run: bool
    debug: bool

    def __post_init__(self) -> None:
        require((self.packed is None) != (self.run_dir is None), "give one of packed=DIR and run_dir=DIR")


@dataclass(frozen=True, kw_only=True)
class AssetsConfig:
    """Everything that `qvgen assets` needs.

    Attributes:
        names: Which assets; None: all.
        out: Where they go; None: the user's cache folder.
        clips: Folder for a table of the fetched clips; None: no table.
        dry_run: Show the table, fetch nothing.
        debug: Show tracebacks.
    """

    names: tuple[str, ...] | None
    out: Path | None
    clips: Path | None
    dry_run: bool
    debug: bool

    def __post_init__(self) -> None:
        require(self.names is None or bool(self.names), "names=[] is empty; write null for all assets")


@dataclass(frozen=True, kw_only=True)
class DataNames:
    """What was chosen from the groups of `qvgen precompute`."""

    model: str
    data: str


@dataclass(frozen=True, kw_only=True)
class PrecomputeConfig:
    """Everything that `qvgen precompute` needs.

    Attributes:
        model: The model family, one with a VAE.
        data: The clips and their cache.
        prompts: Further captions to encode; None: the model's own.
        devices: Processes on this machine; >= 1.
        shard: This machine's share, 0 <= shard < num_shards.
        num_shards: Machines that share the clips; >= 1.
        run_dir: Where the further processes log.
        dry_run: Count what is missing, encode nothing.
        debug: Show tracebacks.
        names: What was chosen from each group.
        plain: All of the above as a plain dict.
    """

    model: Any
    data: Any
    prompts: tuple[str, ...] | None
    devices: int
    shard: int
    num_shards: int
    run_dir: Path
    dry_run: bool
    debug: bool
    names: DataNames
    plain: dict[str, Any]

    def __post_init__(self) -> None:
        positive(devices=self.devices, num_shards=self.num_shards)
        require(0 <= self.shard < self.num_shards, f"shard={self.shard} is not in 0..{self.num_shards - 1}")


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """Everything that `qvgen benchmark` needs.

    Attributes:
        run: Model, data, profile and evaluation: as `qvgen train` has them.
        what: The benchmark.
        methods: Files of conf/init; ``NAME+rN`` on a profile that rotates by N.
        widths: Bit-widths.
        seeds: Seeds, each >= 0.
        videos: Videos per cell of ``ptq``; > 0.
        timed_steps: Optimizer steps per cell of ``training``; > 0.
        out: Folder of the results.
    """

    run: TrainConfig
    what: Literal["ptq", "training"]
    methods: tuple[str, ...]
    widths: tuple[Bits, ...]
    seeds: tuple[int, ...]
    videos: int
    timed_steps: int
    out: Path

    def __post_init__(self) -> None:
        positive(videos=self.videos, timed_steps=self.timed_steps)
        for key in ("methods", "widths", "seeds"):
            require(bool(getattr(self, key)), f"{key}=[] is empty; leave it out for the default")
        for method in self.methods:
            rotation = method.partition("+r")[2]
            require(
                "+" not in method or rotation.isdigit(),
                f"methods holds {method!r}; write a file of conf/init, or for example gptq+r16",
            )
