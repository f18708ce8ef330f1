"""VBench's weighted total against its published arithmetic, written out; and the cells of tables that show it."""

from __future__ import annotations

import csv
import io
from typing import Any

import pytest

from qvgen.evaluation.report.evaluation_page import evaluation_lines
from qvgen.evaluation.report.evaluation_row import csv_rows, latex_row, markdown_row
from qvgen.evaluation.vbench.total import QUALITY, SEMANTIC, scores, summarized_scores

VALUES = {
    "subject_consistency": 0.9678, "background_consistency": 0.9663, "temporal_flickering": 0.9889,
    "motion_smoothness": 0.9773, "dynamic_degree": 0.5986, "aesthetic_quality": 0.6082, "imaging_quality": 0.6168,
    "object_class": 0.8337, "multiple_objects": 0.6263, "human_action": 0.980, "color": 0.7941,
    "spatial_relationship": 0.6990, "scene": 0.5114, "appearance_style": 0.2480, "temporal_style": 0.2436,
    "overall_consistency": 0.2566,
}  # fmt: skip


def entry(value: float) -> dict[str, Any]:
    found = {"value": value, "low": None, "high": None}
    return {
        **found, "title": "x", "unit": "", "better": "higher", "num_videos": 5, "source": "s", "range": [0, 1],
        "blind_to": [], "paired": False, "reference": {**found, "value": 1.0},
    }  # fmt: skip


def test_total_is_the_published_arithmetic() -> None:
    v = VALUES
    quality = (
        (v["subject_consistency"] - 0.1462) / 0.8538 + (v["background_consistency"] - 0.2615) / 0.7385
        + (v["temporal_flickering"] - 0.6293) / 0.3707 + (v["motion_smoothness"] - 0.706) / 0.2915
        + v["aesthetic_quality"] + v["imaging_quality"] + 0.5 * v["dynamic_degree"]
    ) / 6.5  # fmt: skip
    semantic = (
        v["object_class"] + v["multiple_objects"] + v["human_action"] + v["color"] + v["spatial_relationship"]
        + v["scene"] / 0.8222 + (v["appearance_style"] - 0.0009) / 0.2846
        + v["temporal_style"] / 0.364 + v["overall_consistency"] / 0.364
    ) / 9  # fmt: skip
    found = scores({**v, "psnr": 30.0})
    assert found["quality"] == pytest.approx(quality, rel=1e-12)
    assert found["semantic"] == pytest.approx(semantic, rel=1e-12)
    assert found["total"] == pytest.approx((4 * quality + semantic) / 5, rel=1e-12)
    assert found["missing"] == []
    assert set(QUALITY) | set(SEMANTIC) == set(v)
    assert len(v) == 16


@pytest.mark.parametrize("missing", ["scene", "motion_smoothness"])
def test_a_missing_dimension_leaves_no_total(missing: str) -> None:
    found = scores({name: value for name, value in VALUES.items() if name != missing})
    assert found["total"] is None
    assert found["missing"] == [missing]
    assert (found["semantic"] is None) == (missing == "scene")


def test_scores_stand_in_every_table() -> None:
    content: dict[str, Any] = {
        "model": {"label": "ours"}, "reference": {"label": "theirs"}, "num_videos": 5, "num_prompts": 1, "skipped": {},
        "metrics": {name: entry(value) for name, value in VALUES.items()},
    }  # fmt: skip
    content["vbench"] = summarized_scores(content["metrics"])
    assert content["vbench"]["reference"]["quality"] == pytest.approx(
        1 + (0.2915 / 0.2915 - 1 + (1 - 0.706) / 0.2915 - 1) / 6.5
    )
    total = f"{content['vbench']['total']:.3g}"
    head, _, row, theirs = markdown_row(content).splitlines()
    assert head.endswith("| VBench quality ↑ | VBench semantic ↑ | VBench total ↑ |")
    assert row.endswith(f"| {total} |")
    assert theirs.count("|") == head.count("|")
    assert f"& {total} \\\\" in latex_row(content)
    last = list(csv.DictReader(io.StringIO(csv_rows(content))))[-1]
    assert (last["metric"], float(last["value"])) == ("vbench_total", content["vbench"]["total"])
    assert any(line.strip().startswith("VBench total") and total in line for line in evaluation_lines(content))
    del content["metrics"]["color"]
    content["vbench"] = summarized_scores(content["metrics"])
    assert "VBench semantic" not in markdown_row(content)
    assert any("missing: color" in line for line in evaluation_lines(content))
