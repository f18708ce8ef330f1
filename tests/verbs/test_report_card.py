"""qvgen report-card: the page's numbers are those of the report, of the evaluation, and of this machine."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from qvgen.cli import BAD_INPUT, DONE, main
from qvgen.deploy.manifest import read_manifest
from qvgen.verbs.report_card import layer_times

METRIC: dict[str, Any] = {
    "title": "PSNR", "unit": "dB", "better": "higher", "num_videos": 8, "value": 21.0625, "low": 20.5, "high": 21.75,
}  # fmt: skip


def evaluation(packed: Path, **changes: object) -> dict[str, Any]:
    """The content of evaluation.json, as `qvgen evaluate` writes it."""
    sha256 = read_manifest(packed).sha256
    flow = {**METRIC, "title": "Flow | score", "unit": "", "better": "neither", "value": 0.5, "low": None, "high": None}
    flow |= {"reference": {"value": 0.75, "low": 0.5, "high": 1.0}, "difference": {"is_settled": False}}
    return {
        "format": "qvgen-evaluation", "version": 1, "model": {"label": "mine", "sha256": [sha256]}, "suite": "fast",
        "reference": {"label": "teacher"}, "num_videos": 8, "num_prompts": 4, "intervals": {"confidence": 0.95},
        "metrics": {"psnr": METRIC, "flow": {**flow, "warning": "8 videos are few"}}, **changes,
    }  # fmt: skip


@pytest.fixture
def run(short_run: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    shutil.copytree(short_run, folder, ignore=shutil.ignore_patterns("checkpoints", "videos", "wandb"))
    (folder / "evaluation").mkdir()
    (folder / "evaluation" / "evaluation.json").write_text(json.dumps(evaluation(folder / "packed")))
    return folder


def test_the_page_has_quality_speed_recipe_and_origin(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["report-card", f"run_dir={run}", f"evaluation={run / 'evaluation'}", "seconds=0.001", "repo=me/tiny-w3"]
    assert main([*command, "dry_run=true"]) == DONE
    assert not (run / "packed" / "README.md").exists()
    assert main(command) == DONE
    page = run / "packed" / "README.md"
    assert capsys.readouterr().out.splitlines()[-1] == str(page)
    text, report = page.read_text(), json.loads((run / "report.json").read_text())
    assert ModelCard.load(page).data.library_name == "diffusers"
    assert "| PSNR in dB | higher | 21.06 [20.5, 21.75] |  |  | 8 |" in text
    assert "| Flow \\| score | neither | 0.5 | 0.75 [0.5, 1] | no more than noise | 8 |" in text
    assert "8 videos of 4 prompts (suite fast), beside teacher. In brackets: the interval of 95 % over prompts." in text
    assert "Flow | score: 8 videos are few." in text
    seconds = report["sampling"]["variants"]["packed"]["seconds_per_video"]
    assert re.search(rf"\| packed \| [\w, ]+ \| {re.escape(f'{seconds:.4g}')} \|", text)
    layers = read_manifest(run / "packed").layers
    squares = [layer for layer in layers if layer.in_features == layer.out_features]
    (row,) = [line for line in text.splitlines() if line.startswith(f"| {len(squares)} | 64 to 64 |")]
    assert len(row.split("|")) == 9
    assert f" {len(layers) - len(squares)} layers were not timed" in text  # one kind takes longer than a millisecond
    assert "| data | moving_digits |" in text
    assert main(command) == BAD_INPUT
    assert "README.md is there already; write overwrite=true" in capsys.readouterr().err
    assert main([*command, "overwrite=true", "seconds=0"]) == DONE
    assert "were not timed" not in page.read_text()


def test_every_kind_of_layer_is_timed_where_there_is_time(run: Path) -> None:
    text = layer_times(read_manifest(run / "packed"), seconds=60)
    rows = [line.split("|") for line in text.splitlines() if re.match(r"\| \d+ \|", line)]
    assert sum(int(row[1]) for row in rows) == len(read_manifest(run / "packed").layers)
    assert all(float(row[5]) > 0 and float(row[6]) > 0 for row in rows)
    assert "not timed" not in text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model": {"label": "theirs", "sha256": ["0" * 64]}}, "is the evaluation of another model (theirs)"),
        ({"format": "other"}, "is no evaluation; give the folder that `qvgen evaluate packed="),
        ({"metrics": []}, "is damaged: it lacks its model or its metrics"),
    ],
)
def test_numbers_of_another_model_are_refused(
    content: dict[str, object], message: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = run / "evaluation" / "evaluation.json"
    file.write_text(json.dumps(evaluation(run / "packed", **content)))
    assert main(["report-card", f"packed={run / 'packed'}", f"evaluation={file}"]) == BAD_INPUT
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not (run / "packed" / "README.md").exists()


def test_what_is_missing_is_said(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, message in (
        ((), "give one of packed=DIR and run_dir=DIR"),
        ((f"packed={run / 'packed'}", "evaluation=nowhere"), "nowhere"),
        ((f"packed={run / 'packed'}", f"out={run}"), f"out={run} is a folder"),
        ((f"packed={run}",), "manifest.json is missing"),
    ):
        assert main(["report-card", *words]) == BAD_INPUT
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line
