"""A held-out set of fewer than 8 clips is called too small, in the log, the report's page and its JSON."""

from __future__ import annotations

import dataclasses
import logging

import pytest
import torch

from qvgen.evaluation.held_out import too_few_held_out
from qvgen.evaluation.report.json_content import to_json_dict
from qvgen.evaluation.report.writer import render_html
from qvgen.verbs._inputs import open_inputs
from tests.evaluation.report.example_report import report_data
from tests.runs import train_config

SMALL = "The held-out set of {} is too small for its errors to be relied on: use 8 or more"


@pytest.mark.parametrize(("count", "words"), [(1, "1 clip"), (7, "7 clips"), (8, None), (64, None)])
def test_the_report_says_it(count: int, words: str | None) -> None:
    error = dataclasses.replace(report_data().relative_error, num_clips=count)
    data = report_data(relative_error=error)
    sentence = SMALL.format(words) if words else "is too small"
    assert (sentence in render_html(data, {})) == bool(words)
    measured = to_json_dict(data)["relative_error_measured_on"]
    assert measured["num_clips"] == count
    assert (sentence in measured["caution"]) == bool(words)
    assert too_few_held_out(count) == measured["caution"]


def test_the_log_says_it_once_nothing_is_refused_any_more(caplog: pytest.LogCaptureFixture) -> None:
    for samples in (7, 8):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            inputs = open_inputs(train_config(f"evaluation.samples={samples}"))
            assert caplog.text == ""
            inputs(torch.nn.Identity())
        assert (SMALL.format("7 clips") in caplog.text) == (samples == 7)
