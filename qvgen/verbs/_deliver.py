"""The end of the verb ``train``: fold, pack, read back, generate with all models, compare, report."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import yaml
from torch import Tensor, nn

from qvgen.config.command_line import command_line
from qvgen.config.schema.train import TrainConfig
from qvgen.deploy.checkpoint import load_packed
from qvgen.deploy.manifest import WEIGHTS_FILE, read_manifest
from qvgen.evaluation.comparison import FAKE, MEASURED, PACKED, ComparedModels, compare_models
from qvgen.evaluation.environment import collect_environment
from qvgen.evaluation.held_out import HeldOut, relative_error_of
from qvgen.evaluation.packed_checks import bf16_bytes, layer_reports
from qvgen.evaluation.quality_data import Quality
from qvgen.evaluation.report.verdict import judge_all
from qvgen.evaluation.report_data import HeldOutError, ModelSize, ReportData, RunInfo, SkippedLayer
from qvgen.layers.attention_swap import packed_attentions
from qvgen.quant.attention_profile import IN_WORDS
from qvgen.training.callbacks.steps import total_seconds
from qvgen.training.distributed.store_queue import StoreQueue
from qvgen.training.start.student import Measured, fold_student
from qvgen.verbs._parts import named_family, packed_record
from qvgen.verbs._sampling import at_start, begin_sampling, start_absent


@dataclass(frozen=True, kw_only=True)
class TrainingEnd:
    """The end of a training.

    Attributes:
        steps: Optimizer steps that were trained: all, or fewer where a callback ended the run.
        queue: What the run's processes share the sampling out by; None: rank 0 samples alone.
        is_alone: Whether rank 0 alone has the trained student.
        outputs: The trained student's for the held-out inputs, where all processes have computed them while they shared it.
    """

    steps: int
    queue: StoreQueue | None
    is_alone: bool
    outputs: Sequence[Tensor] | None


def deliver(
    config: TrainConfig,
    path: Path,
    *,
    start: Mapping[str, float],
    teacher: nn.Module,
    student: nn.Module,
    measured: Measured,
    ended: TrainingEnd,
) -> ReportData:
    """Fold, pack, read back, generate with all models and compare: all that the report says.

    Afterwards the student may hold the run's start.
    """
    steps, held_out = ended.steps, measured.inputs
    seconds = {"init": start["seconds"], "train": total_seconds(path / "metrics.csv")}
    with _timed(seconds, "fold"):
        record = packed_record(config, steps=steps)
        fold_student(student, path / "packed", model=named_family(config), training=record, kernel=config.kernel)
        packed = load_packed(path / "packed", kernel=config.kernel)  # as a user would
    with_outputs = MEASURED if ended.outputs is None else (PACKED,)
    sampling = begin_sampling(  # the others begin here
        config, path, held_out=held_out, measured=with_outputs, queue=ended.queue
    )
    absent = start_absent(config, path)
    with _timed(seconds, "generate"):
        comparison = compare_models(
            ComparedModels(teacher=teacher, fake=student, packed=packed, start_absent=absent, is_alone=ended.is_alone),
            held_out=held_out,
            sampling=sampling,
            fake_outputs=ended.outputs,
            to_start=partial(at_start, config, student, path),
        )
    error = HeldOutError(
        rtn=start["rtn"],
        ptq=start["ptq"],
        qat=relative_error_of(comparison.outputs[FAKE], measured.reference),
        packed=relative_error_of(comparison.outputs[PACKED], measured.reference),
        num_samples=held_out.num_samples,
        split=held_out.source,
        seed=held_out.seed,
        num_clips=held_out.num_clips if isinstance(held_out, HeldOut) else None,
    )
    return ReportData(
        run=replace(run_info(config), steps=steps),
        relative_error=error,
        size=ModelSize(bf16=bf16_bytes(teacher), packed=(path / "packed" / WEIGHTS_FILE).stat().st_size),
        checks=comparison.checks,
        videos=comparison.videos,
        quality=comparison.quality,
        sampling=comparison.sampling,
        layers=layer_reports(packed),
        attentions=tuple(packed_attentions(packed)),
        attention_words=IN_WORDS[config.profile.attention.kind] if config.profile.attention else "",
        skipped=_skipped_layers(path / "packed"),
        seconds=seconds,
        environment=collect_environment(),
    )


def _skipped_layers(packed: Path) -> tuple[SkippedLayer, ...]:
    skipped = read_manifest(packed).skipped
    return tuple(SkippedLayer(name=name, reason="excluded by the model's patterns") for name in skipped)


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
    for line in video_lines(data.quality):
        print(line)
    print(f"size: {size.packed / 1024:.0f} KiB packed, {size.bf16 / 1024:.0f} KiB in bfloat16")


def video_lines(quality: Quality) -> list[str]:
    """What the videos are worth, in one line each for the packed model and the PTQ start."""
    lines = []
    verdicts = judge_all(quality)
    for variant in reversed(quality.variants):
        if variant.name in ("packed", "ptq-start"):
            shown = [
                f"{quality.metrics[name]} {value:{'.1f' if name == 'psnr_db' else '.3f'}}"
                for name, value in variant.compared.items()
            ]
            shown += [] if variant.flicker is None else [f"flicker {variant.flicker:.2f}"]
            verdict = verdicts[variant.name]
            name = {"packed": "packed model", "ptq-start": "PTQ start"}[variant.name]
            lines.append(f"videos of the {name}: {verdict.level or 'not measured'} ({', '.join(shown)})")
    return lines


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
        command=rerun_command(config),
        config_yaml=yaml.safe_dump(config.plain, sort_keys=False),
    )


def rerun_command(config: TrainConfig) -> str:
    """The command that does the same again, in a folder of its own: what was typed, but for run_dir and resume."""
    kept = [text for text in config.typed if text.lstrip("+~").partition("=")[0] not in ("run_dir", "resume")]
    return command_line("ptq" if config.method.trains == "nothing" else "train", kept)


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    began = time.monotonic()
    yield
    seconds[stage] = time.monotonic() - began
