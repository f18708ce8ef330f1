"""The frozen dataclass that each verb receives, with the meaning and range of every top-level key.

Fields of type ``Any`` are leaves: plain dicts with a ``_target_`` until :func:`qvgen.config.leaves.build_leaves`
has replaced them with the objects.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from qvgen.config.bits import Bits
from qvgen.config.schema.ema import EmaConfig
from qvgen.config.schema.loss import LossConfig
from qvgen.config.schema.may_differ import MayDiffer
from qvgen.config.schema.memory_rules import check_memory_options
from qvgen.config.schema.sections import (
    ActivationSwitchConfig,
    CalibrationConfig,
    CheckpointConfig,
    EvaluationConfig,
    LoggerConfig,
    Names,
    OptimConfig,
    PhiConfig,
    TrainingConfig,
    require,
)
from qvgen.config.schema.strategy import StrategyConfig
from qvgen.config.schema.trainer import TrainerConfig
from qvgen.config.schema.value_range import Range, check_ranges


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that `qvgen train` needs.

    Attributes:
        model: The model family (a :class:`qvgen.models.base.VideoDiT`).
        bits: Bit-widths of weights and activations: one number for both, or wXaY, for example w4a8.
        profile: The two grids and the rotation (a :class:`qvgen.quant.grid.Profile`).
        method: The training method: what is trained, and towards what.
        init: The PTQ method that chooses the first scales and zero points.
        data: The data set that is trained and measured on.
        optim: The optimizer and its schedule.
        strategy: How processes share the work.
        logger: Where metrics go besides metrics.csv.
        export: Targets that the packed model is written for when it is done, to run_dir/exported/NAME: NAME or
            [NAME,NAME], files of conf/export; without ``profile`` the one that they execute is chosen.
        callbacks: Lightning callbacks, each a section with a ``_target_`` under a name (docs/extending.md).
        seed: Seed of everything random but the held-out inputs, which are the same in every run.
        steps: Optimizer steps; greater than 0, and 0 only where nothing is trained (method=ptq).
        batch_size: Samples per optimizer step, over all devices and micro-batches.
        accumulate: Micro-batches of each device per optimizer step; more of them take less memory.
        devices: Processes of a node, one for each GPU. ``auto``: as many as torchrun or SLURM started, else all visible GPUs
            or the most of them that divide the batch, and 1 without a GPU. A number, or a list of visible GPUs ([0,2]).
        num_nodes: Machines, each with ``devices`` processes that torchrun or SLURM starts: 1, or as many as they did.
        device_memory_gib: Memory in GiB of each device that will train, which the plan of dry_run=true counts with;
            None: this machine's.
        network_gbits: Speed of each node's network in Gbit/s, which that plan counts with where there are several nodes;
            None: it says bytes alone.
        kernel: Backend that runs the packed model; ``auto`` picks the best one that is there, a name never falls back.
        run_dir: The run's folder.
        resume: True continues the run in run_dir; ``force`` also where code, models or data are no longer what it began
            with.
        dry_run: True builds and checks everything, says what the run will take, and trains nothing.
        debug: True shows the traceback of an error.
        phi: The low-rank helper that is trained away.
        loss: Noise levels of training, their weights, and blocks that are compared.
        calibration: How a PTQ method that needs statistics sees the full-precision model.
        activation_switch: A policy that changes activation bits while a video is sampled.
        checkpoint: How often the run's state is saved.
        ema: An average of the student over its last steps.
        training: How the processes of a run are watched.
        trainer: Options of Lightning's Trainer.
        evaluation: Measurements and videos of the run.
        names: The option that was chosen from each group.
        typed: The words of the command line behind the verb: flags and overrides.
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
    logger: Annotated[LoggerConfig, MayDiffer.FREE]
    export: Annotated[Any, MayDiffer.FREE]
    callbacks: Any
    seed: Annotated[int, Range("0..4294967295")]
    steps: Annotated[int, Range(">= 0")]
    batch_size: Annotated[int, Range("> 0")]
    accumulate: Annotated[int, Range("> 0"), MayDiffer.FOLLOWING]
    devices: Annotated[int, Range("> 0"), MayDiffer.WORLD]
    num_nodes: Annotated[int, Range("> 0"), MayDiffer.WORLD]
    device_memory_gib: Annotated[float | None, Range("> 0"), MayDiffer.FREE]
    network_gbits: Annotated[float | None, Range("> 0"), MayDiffer.FREE]
    kernel: str
    run_dir: Annotated[Path, MayDiffer.FREE]
    resume: Annotated[Literal[False, True, "force"], MayDiffer.FREE]
    dry_run: Annotated[bool, MayDiffer.FREE]
    debug: Annotated[bool, MayDiffer.FREE]
    phi: PhiConfig
    loss: LossConfig
    calibration: CalibrationConfig
    activation_switch: ActivationSwitchConfig
    checkpoint: Annotated[CheckpointConfig, MayDiffer.FREE]
    ema: EmaConfig
    training: Annotated[TrainingConfig, MayDiffer.FREE]
    trainer: TrainerConfig
    evaluation: EvaluationConfig
    names: Names
    typed: Annotated[tuple[str, ...], MayDiffer.FREE]
    plain: dict[str, Any]

    def __post_init__(self) -> None:
        check_ranges(self)
        require(
            self.steps > 0 or (self.steps == 0 and self.names.method == "ptq"),
            f"steps={self.steps} must be greater than 0; method=ptq alone trains nothing (qvgen ptq)",
        )
        require(
            self.evaluation.samples > 0 or self.names.method == "ptq",
            "evaluation.samples=0 must be greater than 0; only qvgen ptq can leave measuring out",
        )
        require(
            self.world_size == 1 or self.strategy.name != "single",
            f"{self._world} needs more than one process; write {self._world.replace(' x ', ' ')} strategy=auto",
        )
        name = self.strategy.name
        require(
            self.world_size > 1 or not self.strategy.is_sharded,
            f"strategy={name} shares one model out over several devices, and devices=1; write devices=8 strategy={name} for "
            "example, or strategy=single",
        )
        require(
            self.world_size > 1 or name != "deepspeed",
            "strategy=deepspeed shares masters out over several devices, and devices=1; write devices=8 strategy=deepspeed "
            "for example, or strategy=single",
        )
        if name == "deepspeed":
            require(
                self.trainer.precision is None and self.trainer.gradient_clip_algorithm == "norm",
                "trainer.precision and trainer.gradient_clip_algorithm=value are not DeepSpeed's, which clips by the norm "
                "over float32 masters; leave them out, or write strategy=ddp",
            )
        self.strategy.shards(devices=self.devices, nodes=self.num_nodes)
        widths = self.activation_switch.widths
        require(
            widths is None or self.bits.activation in widths,
            f"activation_switch.widths={list(widths or ())} lacks the {self.bits.activation} activation bits of "
            f"bits={self.bits.label}; write for example bits=w{self.bits.weight}a4 activation_switch.widths=[4,8]",
        )
        check_memory_options(
            optim=self.optim, strategy=self.strategy, ema=self.ema, trains=getattr(self.method, "trains", None)
        )
        context = self.strategy.context_parallel
        require(
            self.world_size % context == 0,
            f"strategy.context_parallel={context} does not divide the {self.world_size} processes of {self._world}; write "
            f"for example devices={context}",
        )
        parts, shared = (
            self.world_size // context * self.accumulate,
            "" if context == 1 else f" / context_parallel={context}",
        )
        require(
            self.batch_size % parts == 0,
            f"batch_size={self.batch_size} cannot be divided by {self._world}{shared} x accumulate={self.accumulate}; "
            f"write for example batch_size={max(1, round(self.batch_size / parts)) * parts}",
        )

    @property
    def world_size(self) -> int:
        """Processes of the run, over all nodes."""
        return self.devices * self.num_nodes

    @property
    def _world(self) -> str:
        """The processes as they are written."""
        return f"devices={self.devices}" + (f" x num_nodes={self.num_nodes}" if self.num_nodes > 1 else "")


@dataclass(frozen=True, kw_only=True)
class FoldConfig:
    """Everything that `qvgen fold` needs.

    Attributes:
        run_dir: Folder of the run whose trained model is folded.
        run: The configuration that the run was started with.
        out: Where the packed directory goes.
        overwrite: True replaces a packed directory that is there already; False refuses to.
        trust: Classes outside of qvgen that the run's config.yaml may name, for example ``mine.percentile.Percentile``; their
            code runs.
        force: True folds also where code or model are no longer what the run was trained with.
        dry_run: True says what would be done.
        debug: True shows the traceback of an error.
    """

    run_dir: Path
    run: TrainConfig
    out: Path
    overwrite: bool
    trust: tuple[str, ...]
    force: bool
    dry_run: bool
    debug: bool
