"""Files beside the checkpoints: damaged ones never keep a run from going on, and what took hours is not done again."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import runs
from tests.parts import calibrated_model


def test_a_run_goes_on_with_damaged_side_files(
    block_run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run_dir = runs.copy_until(block_run, tmp_path / "run", step=9)
    (run_dir / "progress.json").write_text("[]")
    table = (run_dir / "metrics.csv").read_text(encoding="utf-8")
    (run_dir / "metrics.csv").write_text(table, encoding="utf-16")
    start = (run_dir / "start.safetensors").read_bytes()
    with caplog.at_level(logging.WARNING):
        assert runs.train(run_dir, *runs.one_block(), "resume=true") == 0
    assert runs.packed_bytes(run_dir) == runs.packed_bytes(block_run)
    assert [row["step"] for row in runs.read_metrics(run_dir)] == ["9", "10", "11"]
    assert (run_dir / "metrics.csv.damaged-1").read_text(encoding="utf-16") == table
    assert (run_dir / "progress.json.damaged-1").read_text() == "[]"
    assert "start.safetensors is used, its errors are measured again" in caplog.text
    assert (run_dir / "start.safetensors").read_bytes() == start


def test_damaged_statistics_of_one_layer_are_sampled_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = runs.train_config(
        *runs.shallow(1),
        "init=smoothquant",
        "calibration.videos=1",
        "calibration.steps=1",
        f"calibration.cache={tmp_path}",
    )
    statistics = calibrated_model(config, teacher=config.model.load_teacher(), encode=config.model.encode, num_bands=1)
    wanted = statistics("blocks.0.attn1.to_q").abs_max
    path = statistics.folder / "blocks.0.attn1.to_q.safetensors"
    whole, others = path.read_bytes(), {p: p.stat().st_mtime_ns for p in statistics.folder.iterdir() if p != path}
    for damage in (b"", whole[:50], whole[:-2] + bytes([whole[-2] ^ 1]) + whole[-1:]):
        path.write_bytes(damage)
        assert torch.equal(statistics("blocks.0.attn1.to_q").abs_max, wanted)
        assert path.read_bytes() == whole
    save_file({name: tensor * 1000 for name, tensor in load_file(path).items()}, path)
    assert torch.equal(statistics("blocks.0.attn1.to_q").abs_max, wanted)
    assert caplog.text.count("it is sampled again") == 4
    assert {p: p.stat().st_mtime_ns for p in others} == others
