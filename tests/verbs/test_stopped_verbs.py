"""Verbs that a signal stops: exit code, the one line, what lies in the folder, and that the printed command goes on.

The signals are real ones that this process sends to itself where a file is opened, renamed or written.
"""

from __future__ import annotations

import json
import logging
import os
import shlex
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from qvgen import stop_request
from qvgen.cli import BAD_INPUT, DONE, INTERRUPTED, TERMINATED, main
from qvgen.config.build import build
from qvgen.config.compose import compose_plain
from qvgen.data.asset_table import ASSETS
from qvgen.verbs import benchmark
from qvgen.verbs.benchmarks.denoising_step import step_rows
from qvgen.verbs.benchmarks.loading import loading_rows
from qvgen.verbs.benchmarks.ptq_cost import cost_rows
from qvgen.verbs.benchmarks.training import training_rows
from tests.models.hub_folders import make_wan_folder
from tests.runs import shallow, snapshot
from tests.stops import run_stopped
from tests.verbs.test_hub_models import tiny_keys, write_clips

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


def test_a_stopped_benchmark_of_kernels_goes_on_with_whole_shapes(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    caplog.set_level("INFO")  # each row is a message
    for peer in ("torchao", "onnxruntime"):
        monkeypatch.setitem(sys.modules, peer, None)
    shapes = ["33x96-64", "9x96-64"]
    command = ["benchmark", "kernels", "widths=[4]", f"shapes=[{','.join(shapes)}]", "timed_steps=1", f"out={tmp_path}"]
    stops = iter(range(99))

    def stop_in_the_second_shape(record: logging.LogRecord) -> bool:
        if shapes[1] in record.getMessage() and next(stops) == 1:  # one of its rows is written
            os.kill(os.getpid(), signal.SIGINT)
        return True

    logger = logging.getLogger(benchmark.__name__)
    logger.addFilter(stop_in_the_second_shape)
    try:
        with stop_request.listening():
            assert main(command) == INTERRUPTED
    finally:
        logger.removeFilter(stop_in_the_second_shape)
    assert "; continue with: " in last_line(capsys)
    (path,) = tmp_path.glob("kernels-cpu-*.json")
    kept = [row for row in json.loads(path.read_text())["rows"] if row.get("shape") != shapes[1]]
    assert {row["shape"] for row in kept if "shape" in row} == {shapes[0]}
    assert main(command) == DONE
    rows = json.loads(path.read_text())["rows"]
    assert rows[: len(kept)] == kept  # as they were measured
    cells = [(row["shape"], row["candidate"]) for row in rows if "shape" in row]
    assert len(set(cells)) == len(cells)
    first, second = ({candidate for shape, candidate in cells if shape == other} for other in shapes)
    assert first == second >= {"F.linear float32", "packed 4"}
    assert path.with_suffix(".md").is_file()
    assert path.with_suffix(".svg").is_file()


def test_no_benchmark_measures_what_is_done() -> None:
    plain = compose_plain("benchmark", ["widths=[4,3]", "methods=[rtn,mse]", "threads=[1]", "what=training"])
    config = replace(build("benchmark", plain), blocks=2, timed_steps=1)
    assert list(training_rows(config, done={("4",), ("3",)})) == []
    assert list(loading_rows(config, done={(1,)})) == []
    assert list(step_rows(config, done={(1,)})) == []
    (row,) = cost_rows(config, done={("4", "rtn"), ("4", "mse"), ("3", "mse")})
    assert (row["bits"], row["method"]) == ("3", "rtn")
    (row,) = loading_rows(replace(config, widths=config.widths[:1], threads=(2, 1)), done={(2,)})
    assert (row["threads"], row["variant"]) == (1, "4")


def test_ptq_goes_on_from_each_phase(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    run_dir, cache = tmp_path / "run", tmp_path / "cache"
    command = [
        "ptq", "init=smoothquant", "logger=csv", "evaluation.samples=4", "evaluation.videos=1", "model.num_inference_steps=1",
        "evaluation.quality_videos=1", "calibration.videos=1", "calibration.steps=1", f"calibration.cache={cache}",
        *shallow(1), f"run_dir={run_dir}",
    ]  # fmt: skip
    kept = "in the PTQ start, whose statistics and measurements are kept as they come"
    after = "after the PTQ start, saved"
    phases = [
        ("os.rename", "blocks.0.ffn", kept),  # the calibration
        ("os.rename", "packed/model.safetensors", after),
        ("os.rename", "sampled/fake-quantized-table-0000.safetensors", after),
        ("os.rename", "report.json", after),
    ]
    for event, part, saved in phases:
        resume = ["resume=true"] if run_dir.exists() else []
        caplog.clear()
        assert run_stopped([*command, *resume], signal.SIGTERM, event, part) == TERMINATED, part
        line = last_line(capsys)
        assert line.startswith(f"stopped {saved}; continue with: "), line
        assert printed_command(line) == [*command, "resume=true"]
        assert half_files(tmp_path) == []
    assert "videos of teacher, shown 0 to 0: kept from before the run was stopped" in caplog.messages
    damaged = run_dir / "sampled" / "packed-table-0000.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    caplog.clear()
    packed = snapshot(run_dir / "packed")
    start = (run_dir / "start.safetensors").stat().st_mtime_ns
    assert main([*command, "resume=true"]) == DONE
    assert (run_dir / "start.safetensors").stat().st_mtime_ns == start
    said = [text for text in caplog.messages if "videos" in text]
    assert [text.partition(":")[0] for text in said if "kept from" in text] == [
        f"videos of {batch} 0 to 0"
        for batch in (
            "teacher, shown",
            "teacher, table",
            "fake-quantized, shown",
            "fake-quantized, table",
            "packed, shown",
        )
    ]
    assert any(text.startswith(f"{damaged} is damaged") and text.endswith("sampled again") for text in said)
    assert not (run_dir / "sampled").exists()
    assert snapshot(run_dir / "packed") == packed
    assert json.loads((run_dir / "report.json").read_text())["packed_codes_equal"] is True


def test_a_stopped_compare_leaves_whole_files(
    short_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["compare", str(short_run), f"out={tmp_path}"]
    assert run_stopped(command, signal.SIGUSR1, "os.rename", "compare.html") == TERMINATED
    line = last_line(capsys)
    assert line.startswith("stopped before it was done; start again with: qvgen compare ")
    assert half_files(tmp_path) == []
    assert main(printed_command(line)) == DONE
    assert sorted(path.name for path in tmp_path.iterdir()) == ["compare.html", "compare.json"]


def test_a_stopped_download_leaves_nothing_and_ends_its_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    programs = tmp_path / "programs"
    programs.mkdir()
    npm = programs / "npm"
    # On a busy machine the program may run before the verb knows its number, and could not be ended yet.
    npm.write_text(f"#!/bin/sh\necho $$ > {tmp_path}/pid\nsleep 0.3\nkill -INT $PPID\nexec sleep 60\n")
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", str(programs), prepend=":")
    (asset, *_) = [asset for asset in ASSETS if asset.kind == "npm"]
    out = tmp_path / "assets"
    command = ["assets", f"names=['{asset.name}']", f"out={out}"]
    with stop_request.listening():
        assert main(command) == INTERRUPTED
    line = last_line(capsys)
    assert line.startswith(f"stopped after 0 of 1 assets, which are in {out}; continue with: qvgen assets ")
    assert printed_command(line) == command
    assert list(out.iterdir()) == []
    deadline = time.monotonic() + 20  # it sleeps for 60 s if nobody ends it
    while is_alive(int((tmp_path / "pid").read_text())):
        assert time.monotonic() < deadline, "the program goes on"
        time.sleep(0.05)


def is_alive(number: int) -> bool:
    """Whether a process of that number is there."""
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_stopped_precompute_keeps_what_it_encoded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, clips = make_wan_folder(tmp_path / "model"), write_clips(tmp_path / "clips", fps=16)
    command = ["precompute", *tiny_keys("wan", folder), f"data.path={clips}", f"data.cache={tmp_path / 'cache'}"]
    assert run_stopped(command, signal.SIGINT, "os.rename", "latents") == INTERRUPTED
    line = last_line(capsys)
    assert line.startswith("stopped while encoding, what is encoded is kept; continue with: ")
    assert printed_command(line) == command
    latents = snapshot(tmp_path / "cache")
    assert half_files(tmp_path) == []
    assert main(command) == DONE
    assert latents.items() <= snapshot(tmp_path / "cache").items()
