"""Verbs that a signal stops: exit code, the one line, what lies in the folder, and that the printed command goes on.

The signals are real ones that this process sends to itself where a file is opened, renamed or written.
"""

from __future__ import annotations

import shlex
import signal
from pathlib import Path

import pytest

from qvgen.cli import BAD_INPUT, DONE, INTERRUPTED, TERMINATED, main
from tests.runs import snapshot
from tests.stops import run_stopped

PROMPT = "a red three moving up left"


def last_line(capsys: pytest.CaptureFixture[str]) -> str:
    shown = capsys.readouterr().err
    assert "Traceback" not in shown
    return shown.splitlines()[-1]


def printed_command(line: str) -> list[str]:
    """What is typed behind ``qvgen``."""
    program, *words = shlex.split(line.partition(" with: ")[2])
    assert program == "qvgen"
    return words


def half_files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.name.endswith(".tmp")]


def test_a_stopped_fold_leaves_nothing_or_a_whole_directory(
    short_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "packed"
    command = ["fold", f"run_dir={short_run}", f"out={out}"]
    assert run_stopped(command, signal.SIGINT, "open", "step-00000012.ckpt") == INTERRUPTED
    line = last_line(capsys)
    assert line.startswith("stopped while folding, nothing was written; start again with: ")
    assert printed_command(line) == command
    assert not out.exists()
    # Between the two files that belong together: both are put in place.
    assert run_stopped(command, signal.SIGTERM, "os.rename", "model.safetensors") == TERMINATED
    line = last_line(capsys)
    whole = f"{out} holds a whole one, an earlier one or this one"
    assert line.startswith(f"stopped before the packed model was checked; {whole}; start again with: ")
    assert printed_command(line) == [*command, "overwrite=true"]
    assert snapshot(out) == snapshot(short_run / "packed")
    assert half_files(tmp_path) == []


def test_a_stopped_generate_goes_on_behind_the_videos_that_are_there(
    short_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    common = ["generate", f"packed={short_run / 'packed'}", f"prompt={PROMPT}", "num_steps=1"]
    assert main([*common, "seed=[1,2,3]", f"out={whole}"]) == DONE
    command = [*common, "seed=[1,2,3]", f"out={out}"]
    assert run_stopped(command, signal.SIGINT, "os.rename", "01-a-red") == INTERRUPTED
    line = last_line(capsys)
    assert line.startswith(f"stopped after 2 of 3 videos, which are in {out}; continue with: ")
    assert printed_command(line) == command
    first, second = sorted(out.glob("*.mp4"))
    assert half_files(out) == []
    assert main([*command, "guidance_scale=3"]) == BAD_INPUT  # other videos
    assert "holds 2 of the 3 files that would be written, from an earlier call" in last_line(capsys)
    assert main([*command, "dry_run=true"]) == DONE
    assert "a stopped call made 2 of them" in capsys.readouterr().out
    second.write_bytes(second.read_bytes()[:-1])
    assert main(command) == BAD_INPUT  # no longer what was written
    assert f"holds 1 of the 2 files that would be written, from an earlier call (first: {second.name})" in last_line(
        capsys
    )
    second.unlink()
    date = first.stat().st_mtime_ns
    assert main(command) == DONE
    assert first.stat().st_mtime_ns == date
    assert snapshot(out) == snapshot(whole)
    assert main(command) == BAD_INPUT  # it is done
    assert "holds 3 of the 3 files" in last_line(capsys)
