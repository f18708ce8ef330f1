"""benchmarks/train_gpu.sh without a GPU: its rehearsal on the CPU, and what it refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from train_gpu import __main__ as program
from train_gpu.page import page
from train_gpu.parts import CASES, REHEARSED, measure_part
from train_gpu.variants import METHODS, configured

SCRIPT = Path(__file__).resolve().parents[3] / "benchmarks" / "train_gpu.sh"


def test_every_variant_is_measured_beside_plan_and_prediction(tmp_path: Path) -> None:
    measure_part("steps", str(tmp_path), True)
    found = json.loads((tmp_path / "steps.json").read_text())
    wanted = [(case.label, variant) for case in REHEARSED["steps"] for variant in case.variants]
    assert [(row["model"], row["variant"]) for row in found] == wanted
    for row in found:
        assert row["micro_batch_s"][0] > 0
        assert row.get("predicted_s", 0.0) > 0 or row["variant"] == "integers"
    assert {row["variant"] for row in found if "planned_bytes" in row} == {"quantized", "with Phi"}


def test_a_rehearsal_runs_its_parts_in_processes_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train_gpu.sh", str(tmp_path), "--rehearse", "--parts", "blocks"])
    assert program.main() == 0
    found = json.loads((tmp_path / "train_gpu.json").read_text())
    assert found["states"] == {"blocks": "done"}
    text = (tmp_path / "train_gpu.md").read_text()
    assert "CPU (rehearsal: times mean nothing)" in text
    assert "| tiny, 1 of its blocks | with Phi |" in text


def test_without_a_gpu_nothing_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["train_gpu.sh", str(tmp_path / "out")])
    assert program.main() == 2
    assert capsys.readouterr().err.startswith("train_gpu.sh: torch finds no GPU; look at nvidia-smi")
    assert not (tmp_path / "out").exists()


def test_an_unknown_part_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["train_gpu.sh", "out", "--parts", "steps,speed"])
    with pytest.raises(SystemExit, match="2"):
        program.main()
    assert "--parts holds speed; there are steps, blocks, runs" in capsys.readouterr().err


def test_the_script_without_arguments_says_how_it_is_called() -> None:
    done = subprocess.run(["bash", str(SCRIPT)], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "bash benchmarks/train_gpu.sh OUT --rehearse" in done.stderr


def test_the_script_names_what_an_interpreter_lacks(tmp_path: Path) -> None:
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S -I "$@"\n')
    bare.chmod(0o755)
    environment = {**os.environ, "PYTHON": str(bare)}
    done = subprocess.run(
        ["bash", str(SCRIPT), str(tmp_path)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "No module named 'torch'" in done.stderr
    assert "lacks what the line above names" in done.stderr


@pytest.mark.parametrize("variant", METHODS)
def test_what_is_measured_on_a_gpu_can_be_configured(variant: str) -> None:
    for case in (*CASES["steps"], *CASES["blocks"]):
        run = configured(case, variant)
        assert run.batch_size == 1
        assert run.method.needs_teacher


def test_a_row_with_an_error_is_shown() -> None:
    head = {"device": "D", "torch": "t", "commit": "c", "rounds": 5, "command": "x"}
    rows = [
        {
            "model": "m",
            "variant": "plain",
            "micro_batch_s": [1, 2, 3],
            "optimizer_s": 1,
            "peak_bytes": 2**30,
            "first_s": 4,
        },
        {"model": "m", "variant": "compiled", "error": "OutOfMemoryError: 3 | 4"},
        {
            "model": "m",
            "variant": "unfused",
            "micro_batch_s": [2, 3, 5],
            "optimizer_s": 1,
            "peak_bytes": None,
            "first_s": 4,
        },
    ]
    runs = [{"method": "kd", "seconds": 10.0, "error": "ended with exit code 2"}]
    lines = page(head, {"steps": rows, "runs": runs})
    assert "| m | plain | 2.000 (1.000 to 3.000) | 1.00 | - | 1.000 | 1.0 | - | 4.0 |" in lines
    assert "| m | compiled | OutOfMemoryError: 3 / 4 |  |  |  |  |  |  |" in lines
    assert "| m | unfused | 3.000 (2.000 to 5.000) | 1.50 | - | 1.000 | - | - | 4.0 |" in lines
    assert "| kd | ended with exit code 2 | | 10 |" in lines
