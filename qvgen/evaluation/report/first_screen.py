"""The first screen of the report: are the videos good, how big is the model, how fast is it.

Left out: any number of its own; all of them are ReportData's, coloured by :mod:`qvgen.evaluation.report.verdict`.
"""

from __future__ import annotations

from dataclasses import dataclass

from qvgen.evaluation.distance import PSNR_CUT_DB
from qvgen.evaluation.quality_data import Quality, SamplingCost, VariantQuality
from qvgen.evaluation.report.page_format import format_db, format_number
from qvgen.evaluation.report.verdict import Level, Verdict, judge_all, rule
from qvgen.evaluation.report_data import ReportData

TEACHER, START, PACKED = "teacher", "ptq-start", "packed"


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One number of a table, and how good it is; None: no limit applies to it."""

    text: str
    level: Level | None = None


@dataclass(frozen=True, kw_only=True)
class MetricRow:
    """One metric of the videos: of the PTQ start and the packed model; the teacher's own value where it has one."""

    label: str
    teacher: str | None
    start: Cell
    packed: Cell


@dataclass(frozen=True, kw_only=True)
class FirstScreen:
    """The content of the first screen, above everything else.

    Attributes:
        verdict: the verdict on the packed model's videos.
        start_verdict: the verdict on the PTQ start's videos; None where it made none.
        metrics: one row each.
        rule: where the colours change.
        notes: what is missing, and why.
        full: time and memory that sampling with the teacher took; None where nothing was sampled.
        packed: the same with the packed model.
        passed: checks that hold, and how many there are.
    """

    verdict: Verdict
    start_verdict: Verdict | None
    metrics: tuple[MetricRow, ...]
    rule: str
    notes: tuple[str, ...]
    full: SamplingCost | None
    packed: SamplingCost | None
    passed: tuple[int, int]

    @property
    def speedup(self) -> float | None:
        """How many times faster than full precision the packed model samples."""
        if self.full is None or self.packed is None or not self.packed.seconds_per_video:
            return None
        return self.full.seconds_per_video / self.packed.seconds_per_video


def build_first_screen(data: ReportData, *, trajectory_agrees: bool) -> FirstScreen:
    """Choose what the first screen shows of a run."""
    quality = data.quality
    verdicts = judge_all(quality)
    costs = {} if data.sampling is None else {cost.name: cost for cost in data.sampling.costs}
    notes = [data.relative_error.caution] if data.relative_error.caution else []
    notes += [f"No {quality.metrics[name]}: {reason}." for name, reason in quality.left_out.items()]
    if quality.start_absent is not None:
        notes.append(f"No videos of the PTQ start: {quality.start_absent}.")
    if not quality.num_still_videos:
        notes.append("No flicker: no caption asks for standing still.")
    as_asked = data.checks.phi_kept or data.checks.phi_rank_final == 0
    checks = (data.checks.packed_codes_equal, trajectory_agrees, as_asked)
    return FirstScreen(
        verdict=verdicts.get(PACKED, Verdict(level=None, metrics={})),
        start_verdict=verdicts.get(START),
        metrics=tuple(_rows(quality, verdicts)),
        rule=rule(),
        notes=tuple(notes),
        full=costs.get(TEACHER),
        packed=costs.get(PACKED),
        passed=(sum(checks), len(checks)),
    )


def _rows(quality: Quality, verdicts: dict[str, Verdict]) -> list[MetricRow]:
    variants = {variant.name: variant for variant in quality.variants}
    teacher = variants.get(TEACHER)

    def shown(name: str, variant: VariantQuality) -> str:
        value = variant.flicker if name == "flicker" else variant.compared.get(name)
        if value is None:
            return format_number(None)
        if name == "psnr_db":
            return "equal" if value >= PSNR_CUT_DB else format_db(value)
        if name != "flicker" or variant is teacher or teacher is None or not teacher.flicker:
            return format_number(value)
        return f"{format_number(value)} ({value / teacher.flicker:.3g}\N{MULTIPLICATION SIGN})"

    def cell(name: str, variant: str) -> Cell:
        quality = variants.get(variant)
        if quality is None:
            return Cell(text=format_number(None))
        level = verdicts[variant].metrics.get(name) if variant in verdicts else None
        return Cell(text=shown(name, quality), level=level)

    return [
        MetricRow(
            label=title[0].upper() + title[1:],
            teacher=shown(name, teacher) if teacher is not None and name == "flicker" else None,
            start=cell(name, START),
            packed=cell(name, PACKED),
        )
        for name, title in {**quality.measured, "flicker": "flicker"}.items()
    ]
