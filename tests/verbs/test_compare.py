"""`qvgen compare`, and what a sweep ends with: real runs through the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qvgen.cli import BAD_INPUT, DONE, main

QUICK = ("logger=csv", "evaluation.samples=0", "steps=0")
"""A PTQ run of a second: nothing is measured."""


def test_a_sweep_into_one_folder_has_a_run_for_each_value_and_ends_with_their_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, own = tmp_path / "root", tmp_path / "own conf"
    (own / "experiment").mkdir(parents=True)
    assert main(["ptq", "-m", "--config-dir", str(own), *QUICK, "bits=8,4", f"run_dir={root}"]) == DONE
    names = ["bits-8", "bits-4"]
    assert sorted(path.name for path in root.iterdir()) == sorted([*names, "compare.html", "compare.json"])
    shown = capsys.readouterr().out
    table = shown[shown.index("run ") :].splitlines()
    assert table[0].split()[:4] == ["run", "bits", "videos", "size"]
    assert [line.split()[:2] for line in table[2:4]] == [["bits-8", "8"], ["bits-4", "4"]]
    assert f"comparison: {root / 'compare.html'}" in shown
    content = json.loads((root / "compare.json").read_text())
    assert [run["state"] for run in content["runs"]] == ["finished"] * 2
    # Each run's own command, as it would be typed alone; the folder would be refused, it holds the run.
    command = f"qvgen ptq --config-dir '{own}' logger=csv evaluation.samples=0 steps=0 bits="
    assert [run["command"] for run in content["runs"]] == [f"{command}8", f"{command}4"]
    sizes = [run["bytes_packed"] for run in content["runs"]]
    assert sizes[0] > sizes[1]
    # Again: each job finds its own run, and says so; the table stands there all the same.
    assert main(["ptq", "-m", *QUICK, "bits=8,4", f"run_dir={root}"]) == BAD_INPUT
    shown = capsys.readouterr()
    assert shown.err.count("holds this very run") == 2
    assert "comparison: " in shown.out


def test_the_verb_compares_what_it_is_given(
    short_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    half = tmp_path / "half"
    half.mkdir()
    (half / "config.yaml").write_bytes((short_run / "config.yaml").read_bytes())
    out = tmp_path / "out"
    assert main(["compare", str(short_run), str(half), f"out={out}"]) == DONE
    shown = capsys.readouterr().out
    report = json.loads((short_run / "report.json").read_text())
    first, second = json.loads((out / "compare.json").read_text())["runs"]
    assert first["error_packed"] == report["relative_error"]["packed"]
    assert first["verdict"] == report["verdict"]["level"]
    assert first["seconds_per_video"] == report["sampling"]["variants"]["packed"]["seconds_per_video"]
    assert (second["state"], second["why"]) == ("unfinished", "no report.json: no step was done")
    assert "unfinished: no report.json: no step was done" in shown
    page = (out / "compare.html").read_text()
    assert page.count("<video") == 2  # the teacher's and the packed model's
    assert f"qvgen compare {short_run} {half} out={out}" in page


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "runs is missing"),
        (["nowhere"], "nowhere is no folder"),
        (["empty"], "empty holds no run"),
        (["empty", "oot=x"], "unknown key 'oot'; did you mean 'out'?"),
    ],
)
def test_what_is_no_run_is_refused(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    assert main(["compare", *words]) == BAD_INPUT
    shown = capsys.readouterr()
    assert message in shown.err
    assert len(shown.err.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_a_dry_run_writes_nothing(short_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(short_run), f"out={tmp_path / 'out'}", "dry_run=true"]) == DONE
    assert f"1 runs into {tmp_path / 'out' / 'compare.html'}" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_of_a_sweep_compares_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ptq", "-m", *QUICK, "bits=8,4", f"run_dir={tmp_path / 'root'}", "dry_run=true"]) == DONE
    shown = capsys.readouterr().out
    assert f"output: {tmp_path / 'root' / 'bits-8'}" in shown
    assert "comparison" not in shown
    assert list(tmp_path.iterdir()) == []
