"""What FVD and KVD say that they are blind to is what was measured, and what the page says."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from qvgen.config.leaves import load_leaf
from qvgen.evaluation.report.page_format import format_number
from tests.evaluation.injected_damage import DAMAGE, STRENGTHS
from tests.evaluation.metrics.set_damage import METRICS, RESULT, features_of, measured, sees, undamaged
from tests.evaluation.metrics.test_metric_values import NETWORKS, needs
from tests.evaluation.real_clips import needs_clips, real_clips

PAGE = Path(__file__).resolve().parents[3] / "docs" / "evaluation.md"


@pytest.fixture(scope="module")
def content() -> dict[str, Any]:
    return json.loads(RESULT.read_text(encoding="utf-8"))


@pytest.mark.parametrize("metric", METRICS)
def test_the_measured_blindness_is_what_the_leaf_says(metric: str, content: dict[str, Any]) -> None:
    start = content["undamaged"][metric]
    blind = {damage for damage in DAMAGE if not sees(content["rows"], metric=metric, damage=damage, start=start)}
    assert blind == set(load_leaf("metric", metric).blind_to)


def test_the_page_shows_the_measured_numbers(content: dict[str, Any]) -> None:
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    for metric in METRICS:
        for damage in DAMAGE:
            values = [row[metric] for row in content["rows"] if row["damage"] == damage]
            assert len(values) == len(STRENGTHS)
            assert f"| {metric.upper()} | {damage} | {' | '.join(map(format_number, values))} |" in lines


@needs(NETWORKS["fvd"])
@needs_clips
@pytest.mark.skipif(os.environ.get("QVGEN_LONG_TESTS") != "1", reason="a minute: QVGEN_LONG_TESTS=1 asks for it")
def test_a_row_is_measured_again(content: dict[str, Any]) -> None:
    clips = real_clips()
    clean = features_of(clips, load_leaf("metric", "fvd"))
    assert undamaged(clean) == pytest.approx(content["undamaged"], rel=1e-3, abs=1e-3)
    row = measured(clips, damage="color", strength=4, clean=clean)
    (stored,) = [one for one in content["rows"] if (one["damage"], one["strength"]) == ("color", 4)]
    assert row == pytest.approx(stored, rel=1e-3)  # float32 sums of another processor
