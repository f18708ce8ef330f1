"""The rule that colours the report, against a table written out by hand: both sides of every limit."""

from __future__ import annotations

import math

import pytest

from qvgen.evaluation.quality_data import VariantQuality
from qvgen.evaluation.report.verdict import judge, rule

TEACHER = VariantQuality(name="teacher", compared={}, flicker=2.0, accuracy={})


def variant(**values: float) -> VariantQuality:
    flicker = values.pop("flicker", None)
    return VariantQuality(name="packed", compared=values, flicker=flicker, accuracy={})


@pytest.mark.parametrize(
    ("metric", "value", "level"),
    [
        ("psnr_db", math.inf, "good"),
        ("psnr_db", 25.0, "good"),
        ("psnr_db", 24.99, "fair"),
        ("psnr_db", 20.0, "fair"),
        ("psnr_db", 19.99, "poor"),
        ("psnr_db", -math.inf, "poor"),
        ("psnr_db", math.nan, "poor"),
        ("ssim", 0.85, "good"),
        ("ssim", 0.84, "fair"),
        ("ssim", 0.6, "fair"),
        ("ssim", 0.59, "poor"),
        ("lpips", 0.0, "good"),
        ("lpips", 0.1, "good"),
        ("lpips", 0.11, "fair"),
        ("lpips", 0.25, "fair"),
        ("lpips", 0.26, "poor"),
        ("lpips", math.nan, "poor"),
        ("flicker", 0.0, "good"),  # less than the teacher's is no fault where nothing should move
        ("flicker", 2.99, "good"),  # 1.5 times, but less than one level of 255 more
        ("flicker", 3.0, "fair"),
        ("flicker", 4.0, "fair"),
        ("flicker", 4.1, "poor"),
        ("flicker", math.nan, "poor"),
    ],
)
def test_every_limit_has_two_sides(metric: str, value: float, level: str) -> None:
    verdict = judge(variant(**{metric: value}), TEACHER)
    assert (verdict.level, dict(verdict.metrics)) == (level, {metric: level})


def test_the_worst_metric_decides() -> None:
    verdict = judge(variant(psnr_db=30.0, ssim=0.9, lpips=0.05, flicker=40.0), TEACHER)
    assert dict(verdict.metrics) == {"psnr_db": "good", "ssim": "good", "lpips": "good", "flicker": "poor"}
    assert verdict.level == "poor"
    assert verdict.words.startswith("Far from")


def test_what_was_not_measured_is_not_judged() -> None:
    assert judge(variant(), TEACHER).level is None
    assert judge(variant(ssim=0.9, flicker=9.0), None).metrics == {"ssim": "good"}
    still = VariantQuality(name="teacher", compared={}, flicker=0.0, accuracy={})
    assert judge(variant(flicker=0.5), still).level == "good"
    assert judge(variant(flicker=5.0), still).level == "poor"


def test_the_rule_in_words_has_every_limit() -> None:
    for part in (
        "PSNR from 25 dB good, from 20 dB fair",
        "SSIM from 0.85",
        "LPIPS up to 0.1 good, up to 0.25",
        "2 times",
    ):
        assert part in rule()
