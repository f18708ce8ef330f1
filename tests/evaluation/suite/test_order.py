"""Full precision before the trained model before its PTQ start: every metric of suite=fast has to see that order.

``order/qat`` and ``order/ptq`` are packed models, of `qvgen train model=tiny bits=3` and `qvgen ptq model=tiny bits=3`: where
the small model's weights or the file's format change, pack them again. docs/evaluation.md has the table of all metrics, the
slow one among them, which is measured once and read here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qvgen.cli import DONE, main
from qvgen.config.leaves import load_leaf
from qvgen.evaluation.metrics.base import Metric

MODELS = Path(__file__).parent / "order"
DOCS = Path(__file__).resolve().parents[3] / "docs"
PROMPTS = (
    "a red three moving up left", "a green six standing still", "a yellow zero moving right", "a blue five moving down",
    "a magenta eight moving up", "a cyan two moving down right",
)  # fmt: skip
SUITE = {name: load_leaf("metric", name) for name in load_leaf("suite", "fast").metrics}


def check_order(metric: Metric, trained: dict[str, Any], start: dict[str, Any], change: dict[str, Any]) -> None:
    """Raise AssertionError where a metric does not see the order, or no more than noise would show."""
    best, sign = (metric.high, 1) if metric.better == "higher" else (metric.low, -1)  # the reference beside itself
    assert sign * best > sign * trained["value"] > sign * start["value"]
    assert change["is_settled"]
    assert sign * change["low" if sign > 0 else "high"] > 0  # the whole interval of the difference


@pytest.fixture(scope="module")
def evaluations(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any]]:
    """Of the start, and of the trained model against it; fewer sampling steps, and no metric that is slow."""
    folder, found = tmp_path_factory.mktemp("order"), []
    names = ",".join(name for name, metric in SUITE.items() if not metric.slow_on_cpu)
    for model in ("ptq", "qat"):
        words = [f"packed={MODELS / model}", f"out={folder / model}", f"references={folder / 'references'}"]
        words += [f"prompts=[{','.join(PROMPTS)}]", "seeds=1", "num_steps=6", f"suite.metrics=[{names}]"]
        words += [f"against={folder / 'ptq'}"] if model == "qat" else []
        assert main(["evaluate", *words]) == DONE
        found.append(json.loads((folder / model / "evaluation.json").read_text()))
    return found[0], found[1]


@pytest.mark.parametrize("name", [name for name, metric in SUITE.items() if not metric.slow_on_cpu])
def test_a_metric_of_fast_sees_the_order(name: str, evaluations: tuple[dict[str, Any], dict[str, Any]]) -> None:
    start, trained = evaluations
    if name in trained["skipped"]:
        pytest.skip(trained["skipped"][name])
    check_order(SUITE[name], trained["metrics"][name], start["metrics"][name], trained["against"]["metrics"][name])


@pytest.mark.parametrize("name", SUITE)
def test_the_table_of_the_docs_has_the_order_in_every_metric_of_fast(name: str) -> None:
    start, trained = (
        json.loads((DOCS / "benchmarks" / f"order-tiny-{model}.json").read_text()) for model in ("ptq", "qat")
    )
    found, worse = trained["metrics"][name], start["metrics"][name]
    check_order(SUITE[name], found, worse, trained["against"]["metrics"][name])
    ends = (found["low"], found["high"], worse["low"], worse["high"])
    assert ends[1] < ends[2] or ends[3] < ends[0]  # the page says that no two intervals overlap
    text = (DOCS / "evaluation.md").read_text(encoding="utf-8")
    (row,) = [line for line in text.splitlines() if line.startswith(f"| {name} |")]
    for one in (found, worse, trained["against"]["metrics"][name]):
        for number in (one["value"], one["low"], one["high"]):
            assert f"{number:.3g}" in row
