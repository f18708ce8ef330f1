"""The end of the verb ``train``: fold, pack, read back, generate with all three models, compare, report."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import yaml
from torch import nn

from qvgen.config.schema import TrainConfig
from qvgen.deploy.checkpoint import load_packed
from qvgen.deploy.manifest import WEIGHTS_FILE, read_manifest
from qvgen.evaluation.comparison import bf16_bytes, compare_models, layer_reports
from qvgen.evaluation.environment import collect_environment
from qvgen.evaluation.held_out import HeldOut, MeasuredInputs
from qvgen.evaluation.report_data import HeldOutError, ModelSize, ReportData, RunInfo, SkippedLayer
from qvgen.training.callbacks import total_seconds
from qvgen.training.student import fold_student


def deliver(
    config: TrainConfig,
    path: Path,
    *,
    start: Mapping[str, float],
    teacher: nn.Module,
    student: nn.Module,
    held_out: MeasuredInputs,
) -> ReportData:
    """Fold, pack, read back, generate with all three models and compare: all that the report says."""
    seconds = {"init": start["seconds"], "train": total_seconds(path / "metrics.csv")}
    with _timed(seconds, "fold"):
        fold_student(config, student, path / "packed", steps=config.steps)
        packed = load_packed(path / "packed", kernel=config.kernel)  # as a user would
    with _timed(seconds, "generate"):
        comparison = compare_models(
            config, teacher=teacher, fake=student, packed=packed, held_out=held_out, run_dir=path
        )
    reference = list(held_out.predictions(teacher))
    return ReportData(
        run=run_info(config),
        relative_error=HeldOutError(
            rtn=start["rtn"],
            ptq=start["ptq"],
            qat=held_out.relative_error(student, reference),
            packed=held_out.relative_error(packed, reference),
            num_samples=held_out.num_samples,
            split=held_out.source,
            seed=held_out.seed,
            num_clips=held_out.num_clips if isinstance(held_out, HeldOut) else None,
        ),
        size=ModelSize(bf16=bf16_bytes(teacher), packed=(path / "packed" / WEIGHTS_FILE).stat().st_size),
        checks=comparison.checks,
        videos=comparison.videos,
        quality=comparison.quality,
        layers=layer_reports(packed),
        skipped=tuple(
            SkippedLayer(name=name, reason="excluded by the model's patterns")
            for name in read_manifest(path / "packed").skipped
        ),
        seconds=seconds,
        environment=collect_environment(),
    )


def show_result(data: ReportData, report: Path) -> None:
    """Print the numbers that a user looks for first."""
    error, size = data.relative_error, data.size
    print(f"report: {report}")
    if error.split != HeldOut.source:
        print(f"measured on {error.num_samples} samples, {error.split}")
    print(f"held-out error of PTQ ({data.run.init}): {error.ptq:.4f}   round to nearest: {error.rtn:.4f}")
    print(f"held-out error of QAT, packed: {error.packed:.4f}   ({error.packed / error.rtn:.2f} x round to nearest)")
    if error.caution:
        print(error.caution)
    print(f"size: {size.packed / 1024:.0f} KiB packed, {size.bf16 / 1024:.0f} KiB in bfloat16")


def run_info(config: TrainConfig) -> RunInfo:
    """What was asked for."""
    return RunInfo(
        model=config.names.model,
        bits=config.bits.label,
        weight_bits=config.bits.weight,
        activation_bits=config.bits.activation,
        profile=config.profile.name,
        method=config.names.method,
        init=config.names.init,
        seed=config.seed,
        steps=config.steps,
        command=command_line(),
        config_yaml=yaml.safe_dump(config.plain, sort_keys=False),
    )


def command_line() -> str:
    """What the user typed; ``qvgen`` for ``python -m qvgen.cli``."""
    name = Path(sys.argv[0]).name
    return shlex.join(["qvgen" if name == "cli.py" else name, *sys.argv[1:]])


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    began = time.monotonic()
    yield
    seconds[stage] = time.monotonic() - began
