"""Curves: reading metrics.csv against a table worked out by hand, the drawings with Python's own XML parser."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from qvgen.evaluation.metric_rows import read_metric_rows
from qvgen.evaluation.report.charts import draw_charts, phi_removed_step, read_history, running_mean
from qvgen.evaluation.report.compare_page import draw_overlaid
from qvgen.evaluation.report.run_record import RunRecord
from tests.evaluation.report.example_report import METRICS_CSV

NORM_TITLE = "Gradient norm, before clipping: all, weights, Phi"


def test_history_skips_empty_cells_and_keeps_the_later_row(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text(METRICS_CSV + "2,0.25,nan,,2,,,\n")  # step 2 once more, after a resume
    history = read_history(path)
    np.testing.assert_array_equal(history["train/loss"][0], [0, 1, 2, 3])
    np.testing.assert_array_equal(history["train/loss"][1], [0.4, 0.3, 0.25, 0.1])
    np.testing.assert_array_equal(history["val/relative_error"][0], [1, 3])
    assert math.isnan(history["train/gradient_norm"][1][2])
    assert phi_removed_step(history) == 3
    assert read_history(tmp_path / "absent.csv") == {}


@pytest.mark.parametrize(
    ("content", "steps", "warning"),
    [
        (b"epoch,loss\n1,2\n", [], "no column 'step'"),
        (b"", [], "no column 'step'"),
        (b"\x00\xff\xfe", [], "no column 'step'"),
        ("step,loss\n1,2\n".encode("utf-16"), [], "no column 'step'"),
        (b"step,loss\n1,2\n2,x\n3,4\n", [1, 3], "1 of 3 rows are damaged"),
        (b"step,loss\n,2\n4,1\n", [4], "1 of 2 rows are damaged"),
        (b"step,loss\n1,2,3\n", [], "1 of 1 rows are damaged"),
        (b"step,loss\n1,2\n\xe9\x00,5\n3,4\n", [1, 3], "1 of 3 rows are damaged"),
        (b'step,loss\n1,2\n2,"' + b"9" * 200_000 + b'"\n', [], "can't be read as a table"),
        (b"\xef\xbb\xbfstep,loss\r\n1,2\r\n", [1], None),
        (b"step,loss\n1,2\n2,", [1, 2], None),
        (b"step,loss\n1,2\n2", [1], None),
    ],
)
def test_of_damaged_metrics_the_whole_rows_are_used(
    tmp_path: Path, content: bytes, steps: list[int], warning: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "metrics.csv"
    path.write_bytes(content)
    rows, damaged = read_metric_rows(path)
    assert [int(row["step"]) for row in rows] == steps
    assert damaged == (warning is not None)
    assert warning is None or warning in caplog.text
    with_numbers = [step for step, row in zip(steps, rows, strict=True) if row["loss"]]
    assert list(read_history(path).get("loss", ([], []))[0]) == with_numbers


def test_running_mean_equals_the_plain_mean() -> None:
    values = np.random.default_rng(0).normal(size=23)
    for window in (1, 3, 9, 51):
        half = window // 2
        expected = [values[max(0, i - half) : i + half + 1].mean() for i in range(len(values))]
        np.testing.assert_allclose(running_mean(values, window=window), expected, rtol=0, atol=1e-13)


def test_charts_are_drawn_for_what_was_logged(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text(METRICS_CSV)
    history = read_history(tmp_path / "metrics.csv")
    charts = draw_charts(history, ptq_error=0.3)
    assert [chart.title.split(",")[0] for chart in charts] == [
        "Training loss",
        "Held-out relative error",
        "Rank of Phi and gate of its decaying columns",
        "Gradient norm",
        "Learning rate",
        "quant/weight_sqnr_db",
    ]
    for chart in charts:
        root = ElementTree.fromstring(chart.svg)
        assert "width" not in root.attrib
        assert "viewBox" in root.attrib
        assert "#0a0b" not in chart.svg  # every placeholder became a variable of the page
        assert set(re.findall(r"#[0-9a-f]{6}\b", chart.svg)) <= {"#ffffff", "#000000"}
        assert "Phi is gone from step 3" in chart.note
    identifiers = [name for chart in charts for name in re.findall(r'\bid="([^"]+)"', chart.svg)]
    assert len(identifiers) == len(set(identifiers))
    assert [chart.title for chart in draw_charts({"train/loss": history["train/loss"]}, ptq_error=None)] == [
        charts[0].title
    ]


@pytest.mark.parametrize("make", [lambda n: np.zeros(n), lambda n: np.full(n, np.nan), lambda n: np.full(n, 1e-300)])
@pytest.mark.parametrize("num_points", [1, 2, 400])
def test_odd_curves_are_drawn_without_a_warning(make: Callable[[int], np.ndarray], num_points: int) -> None:
    names = (
        "train/loss",
        "train/gradient_norm",
        "train/learning_rate",
        "phi/rank",
        "phi/gamma_min",
        "val/relative_error",
    )
    history = {name: (np.arange(num_points), make(num_points)) for name in names}
    for chart in draw_charts(history, ptq_error=math.nan):
        ElementTree.fromstring(chart.svg)


def test_the_papers_two_figures_are_drawn_of_a_run_and_of_two_runs_overlaid() -> None:
    """Norms of all gradients, the weights' and Phi's in one drawing; a run without Phi beside one with it in another."""
    steps = np.arange(30)
    names = ("train/gradient_norm", "train/gradient_norm_weights", "train/gradient_norm_phi")
    helped = {name: (steps, 1.0 + index + 0 * steps) for index, name in enumerate(names)}
    helped["phi/small_share"] = (steps[::3], np.linspace(0, 1, 10))
    helped |= {
        f"clip/{side}_t{start}": (steps[::3], np.full(10, 0.9)) for side in ("low", "high") for start in (0, 200)
    }
    charts = {chart.title: chart.svg for chart in draw_charts(helped, ptq_error=None)}
    assert list(charts) == [
        NORM_TITLE,
        "Share of Phi's singular values below a tenth of the largest",
        "Factor on the minimum of inputs, from timestep T on",
        "Factor on the maximum of inputs, from timestep T on",
    ]
    assert all(f"var(--series-{index})" in charts[NORM_TITLE] for index in (1, 2, 3))
    plain = {name: helped[name] for name in names[:2]}
    records = [
        RunRecord(path=Path(name), name=name, state="finished", why="", settings={}, report={}, history=history)
        for name, history in (("with", helped), ("without", plain))
    ]
    overlaid = {chart.title: chart.svg for chart in draw_overlaid(records)}
    assert list(overlaid) == [
        "Gradient norm, before clipping",
        "Gradient norm of the weights alone, before clipping",
        "Share of Phi's singular values below a tenth of the largest",
    ]
    colors = [[f"stroke: var(--series-{index})" in svg for index in (1, 2)] for svg in overlaid.values()]
    assert colors == [[True, True], [True, True], [True, False]]
