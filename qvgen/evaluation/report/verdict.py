"""Are a model's videos good? One rule, which colours the report and stands in report.json as ``verdict``.

    metric                     good        fair        poor       compared with
    PSNR                       >= 25 dB    >= 20 dB    below      the teacher's video of the same caption and noise
    SSIM                       >= 0.85     >= 0.6      below      the same
    LPIPS                      <= 0.1      <= 0.25     above      the same
    flicker                    <= 1.25 x   <= 2 x      above      the teacher's flicker, where captions ask for standing still

A verdict is the worst of those that were measured; other metrics of suite=fast have no limit. A metric that is no number is
poor: a video of NaN is. Flicker that is less than ``UNSEEN_FLICKER`` levels of 255 above the teacher's is good, whatever the
ratio: nobody sees it.

Same noise and no loss give the same video, so these are distances to it, with limits as image coding uses them; they are
rules of thumb and no study of viewers. A trained model may leave its teacher's video and still make a good one, so "poor"
means far from the teacher's video, and the videos themselves stand below every verdict.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from qvgen.evaluation.quality_data import Quality, VariantQuality

Level = Literal["good", "fair", "poor"]
LEVELS: tuple[Level, ...] = ("good", "fair", "poor")

UNSEEN_FLICKER = 1.0
"""Levels of 255 by which flicker may exceed the teacher's before anybody sees it."""


@dataclass(frozen=True, kw_only=True)
class Limit:
    """Where one metric turns from good to fair and from fair to poor.

    Attributes:
        label: name of the metric in tables.
        good: the last value that is good.
        fair: the last value that is fair.
        rising: larger values are better.
        unit: unit that is written behind a limit.
    """

    label: str
    good: float
    fair: float
    rising: bool
    unit: str = ""

    def level(self, value: float) -> Level:
        """The level of a value; one that is no number is poor."""
        if math.isnan(value):
            return "poor"
        better = (lambda limit: value >= limit) if self.rising else (lambda limit: value <= limit)
        return "good" if better(self.good) else "fair" if better(self.fair) else "poor"

    def rule(self) -> str:
        """The limits in words.

        >>> LIMITS["psnr_db"].rule()
        'PSNR from 25 dB good, from 20 dB fair'
        """
        word = "from" if self.rising else "up to"
        return f"{self.label} {word} {self.good:g}{self.unit} good, {word} {self.fair:g}{self.unit} fair"


LIMITS: Mapping[str, Limit] = {
    "psnr_db": Limit(label="PSNR", good=25.0, fair=20.0, rising=True, unit=" dB"),
    "ssim": Limit(label="SSIM", good=0.85, fair=0.6, rising=True),
    "lpips": Limit(label="LPIPS", good=0.1, fair=0.25, rising=False),
    "flicker": Limit(label="flicker", good=1.25, fair=2.0, rising=False, unit=" times the teacher's"),
}


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The verdict on one variant's videos.

    Attributes:
        level: the worst of ``metrics``; None where nothing was measured.
        metrics: level of each metric that was measured, in the order of ``LIMITS``.
    """

    level: Level | None
    metrics: Mapping[str, Level]

    @property
    def words(self) -> str:
        """The verdict as a sentence."""
        return {
            "good": "Close to the teacher's videos",
            "fair": "Visibly different from the teacher's videos",
            "poor": "Far from the teacher's videos",
            None: "Not measured",
        }[self.level]


def judge(variant: VariantQuality, teacher: VariantQuality | None) -> Verdict:
    """Judge one variant.

    Args:
        variant: its metrics; None is left out.
        teacher: whose flicker is the measure of flicker; without it flicker is left out.
    """
    metrics: dict[str, Level] = {
        name: limit.level(variant.compared[name]) for name, limit in LIMITS.items() if name in variant.compared
    }
    flicker, measure = variant.flicker, None if teacher is None else teacher.flicker
    if flicker is not None and measure is not None:
        metrics["flicker"] = _flicker_level(flicker, measure)
    level = max(metrics.values(), key=LEVELS.index, default=None)
    return Verdict(level=level, metrics=metrics)


def _flicker_level(flicker: float, teacher: float) -> Level:
    if flicker - teacher < UNSEEN_FLICKER:
        return "good"
    return LIMITS["flicker"].level(flicker / teacher if teacher else math.inf if flicker == flicker else math.nan)


def judge_all(quality: Quality) -> dict[str, Verdict]:
    """Verdict by variant, of all but the teacher."""
    by_name = {variant.name: variant for variant in quality.variants}
    teacher = by_name.get("teacher")
    return {name: judge(variant, teacher) for name, variant in by_name.items() if name != "teacher"}


def rule() -> str:
    """The whole rule in one sentence each, for pages."""
    return (
        "; ".join(limit.rule() for limit in LIMITS.values())
        + f" (less than {UNSEEN_FLICKER:g} level of 255 more is not seen); the worst of them is the verdict"
    )
