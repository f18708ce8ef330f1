"""Whole runs of ``method=kd`` and ``method=qdm`` with every option of the loss: one process, FSDP, DDP, and one continued.

The way of such a run is asserted whole: training, folding, packing and report. What the options compute is held in
tests/training (test_noise_level.py, test_min_snr.py, test_block_features.py, test_optim.py).
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qvgen.cli import DONE
from qvgen.training.start.file import START_FILE
from tests.runs import UNSEEN, copy_until, packed_bytes, read_metrics, shallow, train

STEPS = 4
OPTIONS = (
    f"steps={STEPS}", "phi.ranks=[2]",
    "loss.levels=logit_normal", "loss.level_mean=0.5", "loss.weighting=min_snr", "loss.feature_weight=0.1",
    "optim.tail_share=0.25", f"checkpoint.every_steps={STEPS // 2}", "checkpoint.keep=9", "evaluation.samples=1",
    *shallow(1), *UNSEEN,
)  # fmt: skip
SHARED = {
    "kd": ("devices=2", "strategy=fsdp", "strategy.gradient_checkpointing=true"),
    "qdm": ("devices=2", "strategy=ddp"),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each method with the same run on one process and on two."""
    folder = tmp_path_factory.mktemp("methods")
    for method, two in SHARED.items():
        assert train(folder / method / "one", f"method={method}", *OPTIONS) == DONE
        assert train(folder / method / "two", f"method={method}", *OPTIONS, *two) == DONE
    return folder


@pytest.mark.parametrize("method", SHARED)
def test_two_processes_train_pack_and_report_what_one_does(runs: Path, method: str) -> None:
    one, two = runs / method / "one", runs / method / "two"
    assert len(read_metrics(two)) == STEPS
    assert (two / START_FILE).read_bytes() == (one / START_FILE).read_bytes()
    assert read_metrics(two) == read_metrics(one)
    assert packed_bytes(two) == packed_bytes(one)
    reports = [json.loads((run_dir / "report.json").read_text()) for run_dir in (one, two)]
    for report in reports:
        assert (report["method"], report["steps"], report["phi_rank_final"]) == (method, STEPS, 0)
        assert report["packed_codes_equal"] is True
    assert reports[0]["relative_error"] == reports[1]["relative_error"]
    assert f"method={method}" in (one / "report.html").read_text()


@pytest.mark.parametrize("method", SHARED)
def test_the_learning_rate_stays_in_the_tail(runs: Path, method: str) -> None:
    rates = [float(row["train/learning_rate"]) for row in read_metrics(runs / method / "one")]
    assert rates[3:] == pytest.approx([0.1 * max(rates)])
    assert rates[2] > rates[3]


def test_both_methods_begin_with_the_same_error_of_the_clean_sample(runs: Path) -> None:
    """Which is what min-SNR weighs, whether velocities are compared or noises."""
    kd, qdm = (read_metrics(runs / method / "one") for method in SHARED)
    assert float(kd[0]["train/loss"]) == pytest.approx(float(qdm[0]["train/loss"]), rel=1e-5)


def test_a_run_that_was_killed_goes_on_to_the_same_bytes(runs: Path, tmp_path: Path) -> None:
    run_dir = copy_until(runs / "kd" / "one", tmp_path / "run", step=STEPS // 2)
    assert train(run_dir, "method=kd", *OPTIONS, "resume=true") == DONE
    assert packed_bytes(run_dir) == packed_bytes(runs / "kd" / "one")
    assert read_metrics(run_dir) == read_metrics(runs / "kd" / "one")
