"""`qvgen benchmark methods`: each cell is a run, whose report and curves its row is made of; errors in pairs by hand."""

from __future__ import annotations

import json
import shutil
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import yaml

from qvgen.cli import main
from qvgen.evaluation.report.charts import read_history
from qvgen.verbs.benchmarks.methods import in_pairs, method_table, plot_methods
from tests.runs import copy_until, packed_bytes, shallow

SHORT = (
    "steps=2", "phi.ranks=[2]", "evaluation.videos=0", "evaluation.samples=4", "evaluation.quality_videos=1",
    "model.num_inference_steps=2", "evaluation.start_videos=false", "logger=csv", "batch_size=4",
)  # fmt: skip
HEAD = {
    "model": "tiny", "profile": "paper", "samples": 4, "command": "qvgen benchmark methods",
    "machine": {"cpu": "a CPU", "num_threads": 1}, "versions": {"torch": "2"},
}  # fmt: skip


def row(method: str, seed: int, error: float | None) -> dict[str, object]:
    norms = dict.fromkeys(("gradient_norm_weights", "gradient_norm_weights_early"), None if error is None else 1.0)
    return {
        "method": method, "bits": "3", "seed": seed, "init": "mse", "steps": 2 if error else 0, "error_start": 0.2,
        "error": error, "psnr_db": 20.0, "ssim": 0.9, "flicker": 0.01, "init_s": 1.0, "train_s": 3.0 if error else None,
        **norms,
    }  # fmt: skip


ROWS = [
    row("mse", 1, None), row("kd", 1, 0.10), row("qvgen", 1, 0.11), row("mse", 2, None), row("kd", 2, 0.20),
    row("qvgen", 2, 0.19),
]  # fmt: skip


def test_errors_are_compared_in_pairs_of_one_seed() -> None:
    assert in_pairs(ROWS, reference="kd") == {("3", "qvgen"): pytest.approx([10.0, -5.0])}
    page = "\n".join(method_table(HEAD, ROWS))
    assert "Profile paper, init=mse, 2 steps. Mean over the seeds 1, 2, +- half the spread." in page
    assert "| qvgen | 0.2000 +- 0.0000 | 0.1500 +- 0.0400 | +2.5 +- 7.5 | 20.00 +- 0.00 |" in page
    assert "| mse | 0.2000 +- 0.0000 | - | - | 20.00 +- 0.00 |" in page
    assert "per cent above kd's error" in page


def test_rows_of_other_starts_and_lengths_do_not_name_the_page() -> None:
    other = row("kd+init=rtn+steps=9", 1, 0.3) | {"init": "rtn", "steps": 9}
    assert "init=mse, 2 steps." in "\n".join(method_table(HEAD, [*ROWS, other]))


def test_the_plot_has_a_bar_for_each_method(tmp_path: Path) -> None:
    same = [{**row("rtn", seed, None), "error_start": 0.2218044343308589} for seed in (1, 2, 3)]  # whose mean is less
    plot_methods([*ROWS, *same], tmp_path / "plot.svg")
    text = (tmp_path / "plot.svg").read_text()
    ElementTree.fromstring(text)
    assert all(f"<!-- {name} -->" in text for name in ("mse", "kd", "qvgen"))
    assert "<dc:date>" not in text


def test_every_cell_is_a_run_and_a_finished_one_is_not_run_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = [
        "methods=[rtn,'qvgen+r16+optim.betas=[.9,.99]']", "widths=[3]", "seeds=[7]", f"run_dir={tmp_path / 'runs'}", *SHORT,
        *shallow(1), f"out={tmp_path / 'results'}", "optim.betas=[0.8,0.9]",
    ]  # fmt: skip
    named = "qvgen+r16+optim.betas=[.9,.99]"
    assert main(["benchmark", "methods", *keys, "dry_run=true"]) == 0
    assert f"methods on tiny: 2 runs (rtn, {named})" in capsys.readouterr().out
    assert not (tmp_path / "runs").exists()
    assert main(["benchmark", "methods", *keys]) == 0
    rows = json.loads((tmp_path / "results" / "methods-tiny.json").read_text())["rows"]
    assert [(found["method"], found["steps"]) for found in rows] == [("rtn", 0), (named, 2)]
    assert rows[0]["error"] is None
    for found in rows[1:]:
        folder = tmp_path / "runs" / "qvgen+r16+optim.betas--.9-.99--3-7"
        report = json.loads((folder / "report.json").read_text())
        assert report["method"] == found["method"].partition("+")[0]
        assert (found["error_start"], found["error"]) == tuple(report["relative_error"][k] for k in ("ptq", "packed"))
        assert found["ssim"] == report["quality"]["variants"]["packed"]["ssim"]
        _, norms = read_history(folder / "metrics.csv")["train/gradient_norm_weights"]
        assert found["gradient_norm_weights"] == pytest.approx(norms.mean())
        assert found["gradient_norm_weights_early"] == pytest.approx(norms[0])
        config = yaml.safe_load((folder / "config.yaml").read_text())
        assert (config["profile"]["rotation"], config["optim"]["betas"]) == (16, [0.9, 0.99])  # not those of all cells
    assert (tmp_path / "results" / "methods-tiny.md").read_text().startswith("# Methods on tiny")
    assert (tmp_path / "results" / "methods-tiny.svg").is_file()
    reports = [tmp_path / "runs" / name / "report.json" for name in ("rtn-3-7", "qvgen+r16+optim.betas--.9-.99--3-7")]
    before = [path.stat().st_mtime_ns for path in reports]
    reports[0].write_bytes(reports[0].read_bytes() + b" ")  # no longer what the cell wrote: this one is run again
    assert main(["benchmark", "methods", *keys, f"out={tmp_path / 'again'}"]) == 0
    again = json.loads((tmp_path / "again" / "methods-tiny.json").read_text())["rows"]
    assert again[1] == rows[1]
    assert [path.stat().st_mtime_ns == then for path, then in zip(reports, before, strict=True)] == [False, True]
    assert not reports[0].read_bytes().endswith(b" ")


def test_a_cell_that_was_stopped_goes_on_at_its_last_checkpoint(tmp_path: Path) -> None:
    results, run_dir = tmp_path / "results", tmp_path / "runs" / "kd-3-7"
    keys = [
        "methods=[kd]", "widths=[3]", "seeds=[7]", f"run_dir={tmp_path / 'runs'}", f"out={results}", *SHORT, "steps=4",
        "checkpoint.every_steps=2", "checkpoint.keep=9", *shallow(1),
    ]  # fmt: skip
    assert main(["benchmark", "methods", *keys]) == 0
    (whole,) = json.loads((results / "methods-tiny.json").read_text())["rows"]
    packed, curves = packed_bytes(run_dir), (run_dir / "metrics.csv").read_text().splitlines()
    shutil.rmtree(results)  # as if it had been killed in the cell's third step
    stopped = copy_until(run_dir, tmp_path / "stopped", step=2)
    shutil.rmtree(run_dir)
    stopped.rename(run_dir)
    assert main(["benchmark", "methods", *keys]) == 0
    (again,) = json.loads((results / "methods-tiny.json").read_text())["rows"]
    assert packed_bytes(run_dir) == packed
    assert {key: value for key, value in again.items() if not key.endswith("_s")} == {
        key: value for key, value in whole.items() if not key.endswith("_s")
    }
    found = (run_dir / "metrics.csv").read_text().splitlines()
    assert found[:3] == curves[:3]  # with their seconds: the first two steps were not trained again
    assert [line.split(",")[0] for line in found] == [line.split(",")[0] for line in curves]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("qvgn", "methods holds 'qvgn'; did you mean 'qvgen'"),
        ("'qvgen+phi.strat=zero'", "unknown key 'phi.strat'; did you mean 'phi.start'"),
        ("'qvgen+init=mes'", "init=mes"),
        ("qvgen+zero", "methods holds 'qvgen+zero'"),
        ("'kd+seed=3'", "methods holds 'kd+seed=3', which can't change seed; write seeds=[...]"),
    ],
)
def test_a_method_that_is_not_there_is_refused_before_anything_trains(
    name: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = [f"methods=[kd,{name}]", "widths=[3]", f"run_dir={tmp_path / 'runs'}", f"out={tmp_path / 'results'}"]
    assert main(["benchmark", "methods", *keys, *SHORT]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "runs").exists()
