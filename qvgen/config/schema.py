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
    ActivationSwitchConfig,
    CalibrationConfig,
    CheckpointConfig,
    EvaluationConfig,
    LoggerConfig,
    Names,
    OptimConfig,
    PhiConfig,
    StrategyConfig,
    TrainingConfig,
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
        resume: Continue the run in run_dir; ``force``: also where code, models or data are no longer what it began with.
        dry_run: Build and check everything, train nothing.
        debug: Show tracebacks.
        phi: The low-rank helper.
        calibration: What a PTQ method sees of the full-precision model.
        activation_switch: A policy that changes activation bits while sampling.
        checkpoint: How often a run can be resumed from.
        training: What its processes are watched for.
        evaluation: What is measured and shown.
        names: What was chosen from each group.
        typed: What the command line says behind the verb: flags and overrides.
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
    resume: Literal[False, True, "force"]
    dry_run: bool
    debug: bool
    phi: PhiConfig
    calibration: CalibrationConfig
    activation_switch: ActivationSwitchConfig
    checkpoint: CheckpointConfig
    training: TrainingConfig
    evaluation: EvaluationConfig
    names: Names
    typed: tuple[str, ...]
    plain: dict[str, Any]

    def __post_init__(self) -> None:
        require(0 <= self.seed < 2**32, f"seed={self.seed} is outside 0..{2**32 - 1}")
        require(
            self.steps > 0 or (self.steps == 0 and self.names.method == "ptq"),
            f"steps={self.steps} must be greater than 0; method=ptq alone trains nothing (qvgen ptq)",
        )
        require(
            self.evaluation.samples > 0 or self.names.method == "ptq",
            "evaluation.samples=0 must be greater than 0; only qvgen ptq can leave measuring out",
        )
        positive(batch_size=self.batch_size, accumulate=self.accumulate, devices=self.devices)
        positive(device_memory_gib=self.device_memory_gib)
        require(
            self.devices == 1 or self.strategy.name != "single",
            f"devices={self.devices} needs more than one process; write devices={self.devices} strategy=ddp",
        )
        require(
            self.devices > 1 or self.strategy.name != "fsdp",
            "strategy=fsdp shares one model out over several devices, and devices=1; write devices=8 strategy=fsdp for "
            "example, or strategy=single",
        )
        widths = self.activation_switch.widths
        require(
            widths is None or self.bits.activation in widths,
            f"activation_switch.widths={list(widths or ())} lacks the {self.bits.activation} activation bits of "
            f"bits={self.bits.label}; write for example bits=w{self.bits.weight}a4 activation_switch.widths=[4,8]",
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
        overwrite: Replace a packed directory that is there already; otherwise it is refused.
        force: Also where code or model are no longer what the run was trained with.
        dry_run: Say what would be done.
        debug: Show tracebacks.
    """

    run_dir: Path
    run: TrainConfig
    out: Path
    overwrite: bool
    force: bool
    dry_run: bool
    debug: bool
