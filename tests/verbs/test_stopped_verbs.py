"""Verbs that a signal stops: exit code, the one line, what lies in the folder, and that the printed command goes on.

The signals are real ones that this process sends to itself where a file is opened, renamed or written.
"""

from __future__ import annotations

import json
import shlex
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from qvgen.cli import BAD_INPUT, DONE, INTERRUPTED, TERMINATED, main
from qvgen.config.build import build
from qvgen.config.compose import compose_plain
from qvgen.verbs.benchmarks.loading import loading_rows
from qvgen.verbs.benchmarks.training import training_rows
from tests.runs import snapshot
from tests.stops import run_stopped

PROMPT = "a red three moving up left"


def last_line(capsys: pytest.CaptureFixture[str]) -> str:
    shown = capsys.readouterr().err
    assert "Stopped" not in shown  # what a traceback would name
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


def numbers(path: Path) -> list[dict[str, object]]:
    """Rows without what a clock measured."""
    rows = json.loads(path.read_text())["rows"]
    return [{key: value for key, value in row.items() if not key.endswith("_s")} for row in rows]


def test_a_stopped_benchmark_keeps_its_rows_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    command = [
        "benchmark", "ptq", "seeds=[1]", "widths=[8]", "methods=[rtn,mse]", "videos=1", "evaluation.samples=4",
        "model.num_inference_steps=1", "logger=csv", f"out={out}",
    ]  # fmt: skip
    assert run_stopped(command, signal.SIGTERM, "os.rename", "ptq-tiny.json") == TERMINATED
    line = last_line(capsys)
    assert line.startswith(f"stopped after 1 rows, which are in {out / 'ptq-tiny.json'}; continue with: ")
    assert printed_command(line) == ["benchmark", "what=ptq", *command[2:]]
    assert len(numbers(out / "ptq-tiny.json")) == 1
    assert main([*command, "videos=2"]) == BAD_INPUT  # other rows
    assert "holds 1 of the 2 files that would be written, from an earlier call (first: ptq-tiny.json)" in last_line(
        capsys
    )
    # Stopped again, this time before the page is written: nothing is measured any more.
    assert run_stopped(command, signal.SIGINT, "os.rename", "ptq-tiny.md") == INTERRUPTED
    assert last_line(capsys).startswith("stopped after 2 rows")
    before = numbers(out / "ptq-tiny.json")
    assert main(command) == DONE
    assert numbers(out / "ptq-tiny.json") == before
    assert [row["method"] for row in before] == ["rtn", "mse"]
    assert "unfinished" not in (out / "ptq-tiny.json").read_text()
    assert (out / "ptq-tiny.md").read_text().startswith("# PTQ methods on tiny")
    assert main([*command, "dry_run=true"]) == BAD_INPUT  # it is done
    assert "holds 2 of the 2 files" in last_line(capsys)


@pytest.mark.parametrize(
    ("keys", "name", "groups", "count"),
    [
        (["ptq_cost", "widths=[4,3]", "methods=[rtn]"], "ptq-cost-tiny", ("bits",), 2),
        (["denoising_step", "widths=[4]", "threads=[1,2]", "blocks=1"], "denoising-step-tiny-8", ("threads", "variant"), 4),
        (["kernels", "widths=[4]", "shapes=[33x96-64,9x96-64]"], "kernels-cpu", ("shape",), 4),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)  # fmt: skip
def test_each_benchmark_goes_on_with_whole_groups(
    keys: list[str], name: str, groups: tuple[str, ...], count: int, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    for peer in ("torchao", "onnxruntime"):
        monkeypatch.setitem(sys.modules, peer, None)
    command = ["benchmark", *keys, "timed_steps=1", f"out={tmp_path}", "logger=csv"]
    assert run_stopped(command, signal.SIGINT, "os.rename", f"{name}") == INTERRUPTED
    assert "; continue with: " in last_line(capsys)
    (path,) = tmp_path.glob(f"{name}*.json")
    before = json.loads(path.read_text())["rows"]
    assert main(command) == DONE
    rows = json.loads(path.read_text())["rows"]
    assert len(before) < len(rows)
    cells = [tuple(row.get(key) for key in (*groups, "candidate")) for row in rows]
    assert len(cells) >= count
    if keys[0] == "kernels":
        assert next(row for row in rows if "shape" not in row) == {"peers": {"torchao": None, "onnxruntime": None}}
        cells = [cell for cell in cells if cell[0] is not None]
    assert len(set(cells)) == len(cells)  # none is there twice
    if keys[0] == "ptq_cost":
        assert rows[0] == before[0]  # kept as it was measured
    assert path.with_suffix(".md").is_file()


def test_training_and_loading_measure_what_is_not_done() -> None:
    plain = compose_plain("benchmark", ["widths=[4,3]", "threads=[1]", "what=training"])
    config = build("benchmark", plain)
    assert list(training_rows(config, done={("4",), ("3",)})) == []
    assert list(loading_rows(replace(config, blocks=2), done={(1,)})) == []
    (row,) = loading_rows(
        replace(config, blocks=2, widths=config.widths[:1], timed_steps=1, threads=(2, 1)), done={(2,)}
    )
    assert (row["threads"], row["variant"]) == (1, "4")
