"""`qvgen benchmark profiles`: each cell is a whole run, whose report its row is made of."""

from __future__ import annotations

import json
import shlex
import signal
from pathlib import Path

import pytest

from qvgen.cli import INTERRUPTED, main
from tests.runs import shallow
from tests.stops import run_stopped

SHORT = (
    "steps=2", "phi.ranks=[2]", "evaluation.videos=1", "evaluation.samples=4", "evaluation.quality_videos=1",
    "batch_size=4", "model.num_inference_steps=2",
    "evaluation.start_videos=false", "calibration.videos=1", "calibration.steps=2", "logger=csv",
)  # fmt: skip


def test_every_cell_is_a_run_and_its_row_has_the_figures_of_its_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cells = ["profiles=[svdq_g64,paper]", "widths=[3]", "seeds=[7]", f"run_dir={tmp_path / 'runs'}"]
    keys = [*cells, *SHORT, *shallow(1), f"out={tmp_path / 'results'}"]
    assert main(["benchmark", "profiles", *keys, "dry_run=true"]) == 0
    assert "profiles on tiny: 2 runs of qvgen train (svdq_g64, paper)" in capsys.readouterr().out
    assert not (tmp_path / "runs").exists()
    stopped = run_stopped(["benchmark", "profiles", *keys], signal.SIGINT, "open", "paper-3-7/checkpoints/")
    assert stopped == INTERRUPTED
    last = capsys.readouterr().err.splitlines()[-1]
    assert shlex.split(last.partition(" with: ")[2]) == [
        "qvgen",
        "benchmark",
        "what=profiles",
        *keys,
    ]  # not the cell's run_dir
    assert last.startswith("stopped after step 2, saved; continue")
    assert main(["benchmark", "profiles", *keys]) == 0
    rows = json.loads((tmp_path / "results" / "profiles-tiny.json").read_text())["rows"]
    assert [(row["profile"], row["bits"], row["seed"]) for row in rows] == [("svdq_g64", "3", 7), ("paper", "3", 7)]
    assert [row["in_runtime"] for row in rows] == [False, True]  # nobody else's kernels take inputs of 3 bits
    for row in rows:
        report = json.loads((tmp_path / "runs" / f"{row['profile']}-3-7" / "report.json").read_text())
        assert (report["profile"], report["bits"], report["seed"]) == (row["profile"], "3", 7)
        assert (row["error_ptq"], row["error_qat"]) == tuple(report["relative_error"][key] for key in ("ptq", "qat"))
        assert row["psnr_db_trained"] == report["quality"]["variants"]["packed"]["psnr_db"]
        assert row["psnr_db_start"] is None  # evaluation.start_videos=false
    page = (tmp_path / "results" / "profiles-tiny.md").read_text()
    assert f"| svdq_g64 | qvgen* | {rows[0]['error_rtn']:.4f} | {rows[0]['error_ptq']:.4f} |" in page
    assert f"| paper | qvgen | {rows[1]['error_rtn']:.4f} |" in page


def test_a_profile_that_is_not_there_is_refused_before_anything_trains(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = ["profiles=[paper,svdq]", "widths=[3]", f"run_dir={tmp_path / 'runs'}", f"out={tmp_path / 'results'}"]
    assert main(["benchmark", "profiles", *keys, *SHORT]) == 2
    assert "profiles holds 'svdq'; did you mean" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
