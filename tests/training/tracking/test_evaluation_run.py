"""An evaluation's offline run is read back record by record: what it used, what it made, its tables and their videos."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import av
import pytest
from wandb.proto.wandb_internal_pb2 import Record

from qvgen.cli import DONE, main
from qvgen.config.run_config import read_config
from qvgen.run_directory import write_plain
from qvgen.verbs._parts import open_log
from tests.runs import train_config
from tests.training.tracking.wandb_records import configuration, history, read_records, run_record, summary

PROMPT = "a red three moving up left"
LOGGER = {"name": "wandb", "project": "videos", "group": "mine", "tags": [], "upload": "report", "further": {}}


def evaluate(run_dir: Path, out: Path, *words: str) -> int:
    return main(
        ["evaluate", f"run_dir={run_dir}", f"prompts=[{PROMPT}]", "seeds=2", "suite.metrics=[psnr,temporal_flickering]",
         f"out={out}", f"references={run_dir.parent / 'references'}", *words]
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(short_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds ``run``, a training that was logged offline, and ``out``, the evaluation of its packed model."""
    folder = tmp_path_factory.mktemp("logged")
    run_dir = Path(shutil.copytree(short_run, folder / "run", ignore=shutil.ignore_patterns("checkpoints")))
    write_plain(run_dir / "config.yaml", {**read_config(run_dir), "logger": LOGGER})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        with open_log(train_config("logger=wandb", "logger.group=mine"), run_dir):
            pass  # the report is there, so it is logged
        assert evaluate(run_dir, folder / "out") == DONE
    return folder


def records_of(folder: Path) -> list[Record]:
    (offline,) = (folder / "wandb").glob("offline-run-*")
    return read_records(offline)


def artifacts(records: list[Record]) -> dict[str, Any]:
    found = [record.artifact for record in records if record.WhichOneof("record_type") == "artifact"]
    return {artifact.type: artifact for artifact in found}


def table(records: list[Record], name: str) -> tuple[list[dict[str, Any]], dict[str, Path]]:
    """The rows of a table, and the files that its cells name; both are in an artifact of the table's own."""
    contents = [
        {entry.path: Path(entry.local_path) for entry in record.artifact.manifest.contents}
        for record in records
        if record.WhichOneof("record_type") == "artifact"
    ]
    (files,) = [found for found in contents if f"{name}.table.json" in found]
    content = json.loads(files[f"{name}.table.json"].read_text())
    return [dict(zip(content["columns"], row, strict=True)) for row in content["data"]], files


def test_the_evaluation_is_a_run_that_uses_what_the_training_made(folder: Path) -> None:
    training, evaluation = records_of(folder / "run"), records_of(folder / "out")
    made, used = artifacts(training)["model"], artifacts(evaluation)["model"]
    assert (made.name, made.use_after_commit) == (f"packed-{run_record(training).run_id}", False)
    assert (used.name, used.use_after_commit) == (made.name, True)
    assert (
        used.digest == made.digest
    )  # so the service has one version of it, with the training before and this run behind
    result = artifacts(evaluation)["evaluation"]
    run = run_record(evaluation)
    assert (result.name, result.use_after_commit) == (f"evaluation-{run.run_id}", False)
    assert run.run_id != run_record(training).run_id
    assert (run.job_type, run.run_group, run.project) == ("evaluation", "mine", "videos")
    assert configuration(evaluation)["training"] == run_record(training).run_id
    files = {entry.path: Path(entry.local_path).read_bytes() for entry in result.manifest.contents}
    assert files == {path.name: path.read_bytes() for path in (folder / "out").glob("evaluation.*")}
    assert len(files) == 5


def test_numbers_intervals_and_pairs_are_those_of_the_evaluation(folder: Path) -> None:
    content = json.loads((folder / "out" / "evaluation.json").read_text())
    records = records_of(folder / "out")
    found = summary(records)
    for name, entry in content["metrics"].items():
        for end in ("value", "low", "high"):
            assert found[f"evaluation/{name}/{end}"] == entry[end]
    logged = {key for row in history(records) for key in row}
    assert {"eval/metrics/path", "eval/pairs/path"} <= logged
    metrics, _ = table(records, "eval/metrics")
    assert [row["value"] for row in metrics] == [entry["value"] for entry in content["metrics"].values()]
    assert [row["reference value"] is None for row in metrics] == [True, False]
    pairs, files = table(records, "eval/pairs")
    values = {video["seed"]: video["values"]["psnr"] for video in content["videos"]}
    assert {row["seed"]: row["psnr"] for row in pairs} == values
    assert [row["psnr"] for row in pairs] == sorted(values.values(), reverse=True)
    assert {row["prompt"] for row in pairs} == {PROMPT}
    for row in pairs:
        for side in ("reference", "model"):
            with av.open(str(files[row[side]["path"]])) as video:
                assert sum(1 for _ in video.decode(video=0)) == 8, side


def test_the_same_command_goes_on_with_the_same_run_and_wandb_false_logs_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    record = (folder / "out" / "wandb_run.json").read_bytes()
    again = tmp_path / "again"
    shutil.copytree(folder / "out", again, ignore=shutil.ignore_patterns("wandb"))
    assert evaluate(folder / "run", again) == DONE
    assert (again / "wandb_run.json").read_bytes() == record
    assert run_record(records_of(again)).run_id == json.loads(record)["id"]
    silent = tmp_path / "silent"
    assert evaluate(folder / "run", silent, "wandb=false") == DONE
    assert not (silent / "wandb").exists()
    damaged = tmp_path / "damaged"
    shutil.copytree(folder / "run", damaged, ignore=shutil.ignore_patterns("wandb"))
    (damaged / "wandb_run.json").write_text("[]")
    assert evaluate(damaged, tmp_path / "of-damaged") == DONE
    assert "the evaluation is not logged at wandb" in caplog.text
    assert not (tmp_path / "of-damaged" / "wandb").exists()
