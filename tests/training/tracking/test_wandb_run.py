"""wandb: what is written offline is read back record by record; a server on this machine answers as wandb's would."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from qvgen.config import TrainConfig
from qvgen.config.schema.sections import LoggerConfig
from qvgen.training.tracking import service, wandb_run
from qvgen.training.tracking.report_panels import flat_numbers
from qvgen.training.tracking.service import check_wandb, wandb_problem
from qvgen.training.tracking.wandb_run import WandbRun
from qvgen.verbs._parts import open_log, run_label
from tests.runs import train_config
from tests.training.tracking.wandb_records import configuration, history, read_records, run_record, summary

WANDB = LoggerConfig(name="wandb", project="qvgen", group=None, tags=(), upload="report", further=())
REPORT = {
    "relative_error": {"ptq": 0.5, "qat": 0.25},
    "packed_codes_equal": True,
    "layers": [{"name": "to_q", "bytes": 8}],
    "psnr_db": "inf",
    "model": "tiny",
}


@pytest.fixture(autouse=True)
def asked_anew(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    wandb_problem.cache_clear()
    yield
    wandb_problem.cache_clear()


@pytest.fixture(scope="module")
def config() -> TrainConfig:
    return train_config("logger=wandb")


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Our own."""
    return [
        record.getMessage()
        for record in caplog.records
        if record.levelno >= logging.WARNING and record.name.startswith("qvgen")
    ]


class Answer(BaseHTTPRequestHandler):
    """Answers each request as its server's ``answer`` says: (code, text), or nothing at all."""

    def do_POST(self) -> None:
        self.server.asked.append(self.headers["Authorization"])
        if self.server.answer is None:
            self.server.release.wait(30)
            return
        code, text = self.server.answer
        self.send_response(code)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    with HTTPServer(("127.0.0.1", 0), Answer) as made:
        made.asked, made.answer, made.release = [], None, threading.Event()
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{made.server_port}/")
        monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
        thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield made
        made.release.set()
        made.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        ((401, "no"), r"refuses WANDB_API_KEY \(HTTP 401\)"),
        ((403, "no"), r"refuses WANDB_API_KEY \(HTTP 403\)"),
        ((200, '{"data": {"viewer": null}}'), "does not know WANDB_API_KEY"),
        ((200, '{"data": {"viewer": {"id": "x"}}}'), None),
        ((200, "<html>a proxy</html>"), None),
        ((503, "busy"), None),
        (None, r"(no answer within 0.3 s|can't be reached)"),
    ],
)
def test_a_key_is_tried_before_the_work_begins(
    answer: tuple[int, str] | None,
    problem: str | None,
    server: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(service, "PROBE_SECONDS", 0.3 if answer is None else 20.0)
    server.answer = answer
    for _ in range(2):  # asked and said once
        check_wandb(WANDB)
    assert len(server.asked) == 1
    assert server.asked[0].startswith("Basic ")
    warnings = warnings_of(caplog)
    if problem is None:
        assert warnings == []
    else:
        (line,) = warnings
        assert re.search(problem, line)
        assert "offline, `wandb sync` sends it later" in line


def test_no_network_makes_an_offline_run_with_one_warning(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with HTTPServer(("127.0.0.1", 0), Answer) as closed:
        port = closed.server_port
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("WANDB_API_KEY", "invalid")
    check_wandb(config.logger)
    with open_log(config, tmp_path) as loggers:
        loggers[0].log_metrics({"train/loss": 1.0}, step=0)
    (line,) = warnings_of(caplog)
    assert line.startswith(f"wandb: http://127.0.0.1:{port} can't be reached (")
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    assert [row["train/loss"] for row in history(read_records(folder))] == [1.0]


def test_offline_csv_and_dry_runs_ask_nobody(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    check_wandb(replace(WANDB, name="csv"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    check_wandb(WANDB)
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.delenv("WANDB_API_KEY")
    check_wandb(WANDB)
    assert server.asked == []


def test_all_sessions_of_a_training_are_one_run(config: TrainConfig, tmp_path: Path) -> None:
    of_sweep = replace(config, logger=replace(WANDB, group="my sweep", tags=("mine",)))
    steps = [range(4), range(2, 6)]  # the first session was killed after a checkpoint of step 2
    for number, session in enumerate(steps):
        # a sweep's job that is continued alone stays in its group
        with open_log(config if number else of_sweep, tmp_path) as loggers:
            for step in session:
                loggers[0].log_metrics({"train/loss": float(step)}, step=step)
            if number:
                (tmp_path / "report.json").write_text(json.dumps(REPORT))
    folders = sorted((tmp_path / "wandb").glob("offline-run-*"), key=lambda path: path.stat().st_mtime)
    first, second = (read_records(folder) for folder in folders)
    for records, session in zip((first, second), steps, strict=True):
        run, rows = run_record(records), history(records)
        assert run.run_id == json.loads((tmp_path / "wandb_run.json").read_text())["id"]
        assert run.display_name == f"tiny-3-qvgen mse seed 42 {tmp_path.name}"
        assert run.run_group == "my sweep"
        assert {"tiny", "bits=3", "qvgen", "mse", "paper"} <= set(run.tags)
        assert [row["_step"] for row in rows] == [row["trainer/global_step"] for row in rows] == list(session)
        assert [row["train/loss"] for row in rows] == [float(step) for step in session]
        assert configuration(records)["seed"] == 42
        assert configuration(records)["optim"]["learning_rate"] == config.optim.learning_rate
    assert "mine" in run_record(first).tags
    found = {key: value for key, value in summary(second).items() if key.startswith("report/")}
    assert found == flat_numbers(REPORT) | {"report/psnr_db": found["report/psnr_db"]}
    assert float(found["report/psnr_db"]) == float("inf")
    assert not any(key.startswith("report/") for key in summary(first))


def test_a_damaged_record_makes_a_new_run(
    config: TrainConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for content in ("", "[]", '{"id": 3}', '{"id": ""}'):
        (tmp_path / "wandb_run.json").write_text(content)
        caplog.clear()
        record = wandb_run._record(config.logger, tmp_path, run_label(config))
        assert len(record["id"]) == 8
        assert "wandb_run.json is damaged" in caplog.text
        assert wandb_run._record(config.logger, tmp_path, run_label(config)) == record


class FullDisk:
    """A wandb run that can't write any more."""

    id = "abc"

    def log(self, row: dict[str, float], step: int | None) -> None:
        raise OSError(28, "No space left on device")

    finish = None


def test_what_wandb_raises_is_a_warning_and_the_end_of_wandb_alone(caplog: pytest.LogCaptureFixture) -> None:
    run = WandbRun(FullDisk())
    for step in range(3):
        run.log_metrics({"train/loss": 1.0}, step=step)
    run.finish()
    (line,) = warnings_of(caplog)
    assert line.startswith("wandb failed")
    assert "OSError: [Errno 28] No space left on device" in line


def test_a_folder_that_cannot_be_written_leaves_metrics_alone(
    config: TrainConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "wandb_run.json").mkdir()
    with open_log(config, tmp_path) as loggers:
        assert loggers == []
    assert "does not begin" in caplog.text


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The folder of a program that lost its disk and then its wandb process, and what it said of wandb."""
    folder = tmp_path_factory.mktemp("faults")
    paths = {"PYTHONPATH": ":".join(filter(None, sys.path)), "WANDB_MODE": "offline"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.training.tracking.wandb_faults", str(folder)],
        cwd=Path(__file__).resolve().parents[3],
        env=os.environ | paths,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return folder, [line for line in done.stderr.splitlines() if "wandb" in line]


def test_a_disk_that_fills_up_costs_nothing_but_a_warning(faults: tuple[Path, list[str]]) -> None:
    folder, said = faults
    full = folder / "full"
    (line,) = [line for line in said if str(full) in line]
    assert line.startswith(f"wandb can't write to {full}/wandb/offline-run-")
    assert line.endswith(
        "/files (File too large): rows are missing there; training goes on, and metrics.csv has all of them"
    )
    (record,) = (full / "wandb").glob("offline-run-*/*.wandb")
    assert record.stat().st_size <= 20_000  # 500 rows take more
    assert (full / "whole").exists()


def test_a_killed_wandb_process_costs_nothing_but_a_warning(faults: tuple[Path, list[str]]) -> None:
    folder, said = faults
    assert (folder / "killed" / "done").exists()
    (line,) = [line for line in said if str(folder / "full") not in line]
    assert line.startswith("wandb failed, training goes on without it (")
